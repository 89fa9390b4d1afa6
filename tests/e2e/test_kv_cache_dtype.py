"""K and V of a bfloat16 model take half the memory, and the mesh answers from them."""

from __future__ import annotations

from pathlib import Path

import pytest
from openai.types.chat import ChatCompletion

from tests.e2e.mesh_process import Mesh

# The demo model, which is stored in bfloat16: K and V, layers, heads, head_dim.
VALUES_PER_TOKEN = 2 * 5 * 4 * 32
TOKENS_IN_FLOAT32 = 320
KV_BYTES = TOKENS_IN_FLOAT32 * VALUES_PER_TOKEN * 4
FLAGS = ("--no-cache", "--set", f"scheduler.kv_cache_bytes={KV_BYTES}")
QUESTION = "What is the capital of France?"


def pool(mesh: Mesh) -> tuple[float, float]:
    """Its bytes, and the tokens that fit."""
    return (
        mesh.metric("shard-0", "shard_kv_cache_bytes"),
        mesh.metric("shard-0", "shard_kv_cache_tokens"),
    )


def ask(mesh: Mesh, preamble: str) -> ChatCompletion:
    return mesh.openai().chat.completions.create(
        model=mesh.model,
        messages=[{"role": "system", "content": preamble}, {"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=24,
        logprobs=True,
        top_logprobs=5,
    )


@pytest.mark.slow
def test_twice_as_many_tokens_fit_the_same_bytes_and_are_served(tmp_path: Path) -> None:
    for name in ("auto", "float32"):
        (tmp_path / name).mkdir()
    with Mesh(tmp_path / "float32", *FLAGS, "--kv-cache-dtype", "float32") as wide:
        assert pool(wide) == (KV_BYTES, TOKENS_IN_FLOAT32)
        wanted = ask(wide, "Be brief.").choices[0].message.content
    with Mesh(tmp_path / "auto", *FLAGS) as mesh:
        assert pool(mesh) == (KV_BYTES, 2 * TOKENS_IN_FLOAT32)
        assert ask(mesh, "Be brief.").choices[0].message.content == wanted
        assert "Paris" in (wanted or "")
        # A prompt and its answer that float32 has no blocks for.
        long = "The sky is blue. " * 60
        first = ask(mesh, long)
        assert first.usage is not None
        assert first.usage.total_tokens > TOKENS_IN_FLOAT32
        again = ask(mesh, long)
        assert mesh.metric("scheduler-0", "prefix_cache_hits_total") > 0
        assert again.choices[0].logprobs == first.choices[0].logprobs
