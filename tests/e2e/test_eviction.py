"""Where memory is short, kept blocks are given up by what keeping them saves."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from benchmarks.prefix_reuse import Conversations, Workload
from tests.e2e.mesh_process import Mesh

# One request after another, so that every run evicts alike. Memory for a fraction of it.
TALK = Workload(
    chats=24,
    turns=10,
    system_tokens=64,
    user_tokens=20,
    answer_tokens=16,
    single_requests=200,
    single_tokens=200,
    spread=10.0,
    concurrency=1,
    seed=3,
)
NUM_BLOCKS = 320


def computed(folder: Path, policy: str) -> tuple[float, float]:
    """Prompt tokens computed and blocks evicted of a mesh with this policy, after the talk."""
    folder.mkdir()
    profile = folder / "profile.json"
    profile.write_text(json.dumps({"fixed_us": 100, "per_decode_row_us": 0}))
    settings = (f"shard.simulated_profile={profile}", f"scheduler.num_blocks={NUM_BLOCKS}")
    flags = (*settings, f"scheduler.kv_eviction={policy}")
    words = [word for flag in flags for word in ("--set", flag)]
    with Mesh(folder, "--no-cache", "--engine", "simulated", *words) as mesh:

        async def talk() -> None:
            url, key = mesh.facts["url"], mesh.facts["api_key"]
            headers = {"Authorization": f"Bearer {key}"}
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
                await Conversations(client, mesh.model, TALK).run()

        asyncio.run(talk())
        names = ("prompt_tokens_computed_total", "prefix_cache_evictions_total")
        tokens, evictions = (mesh.metric("scheduler-0", name) for name in names)
        assert mesh.metric("scheduler-0", "num_blocks_used") == 0
        kept = [mesh.metric("scheduler-0", f"num_blocks_{kind}") for kind in ("free", "cached")]
        assert sum(kept) == NUM_BLOCKS
    return tokens, evictions


@pytest.mark.slow
def test_chats_are_kept_before_what_was_asked_once_when_memory_is_short(tmp_path: Path) -> None:
    by_value, by_age = (computed(tmp_path / policy, policy) for policy in ("value", "lru"))
    assert by_value[0] <= 0.95 * by_age[0]
    assert 0 < by_value[1] < by_age[1]
