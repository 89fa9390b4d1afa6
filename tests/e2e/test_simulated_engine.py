"""The whole mesh without a model's arithmetic: step times from a profile, and no torch anywhere."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.mesh_process import Mesh, wait_until

STEP_S = 0.1
TOKENS = 10
WINDOW = 2  # steps in flight


@pytest.fixture(scope="module")
def simulated_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Two replicas whose steps take 100 ms whatever they hold."""
    folder = tmp_path_factory.mktemp("simulated")
    profile = folder / "profile.json"
    nothing = dict.fromkeys(
        ("per_prefill_token_us", "per_decode_row_us", "per_context_token_us"), 0
    )
    profile.write_text(json.dumps({"fixed_us": STEP_S * 1e6, **nothing}))
    flags = ("--no-cache", "--engine", "simulated", "--set", f"shard.simulated_profile={profile}")
    with Mesh(folder, *flags, "--replicas", "2") as mesh:
        yield mesh


async def answer(mesh: Mesh, seed: int) -> str:
    async with mesh.async_openai(max_retries=0) as client:
        reply = await client.completions.create(
            model=mesh.model, prompt="Anything", temperature=1, seed=seed, max_tokens=TOKENS
        )
    assert reply.usage.completion_tokens == TOKENS
    return reply.choices[0].text


async def test_simulated_mesh_answers_with_words_of_its_seed(simulated_mesh: Mesh) -> None:
    first, again, other = [await answer(simulated_mesh, seed) for seed in (1, 1, 2)]
    assert first == again != other
    assert first.strip()


async def test_simulated_steps_take_what_the_profile_says(simulated_mesh: Mesh) -> None:
    began = time.perf_counter()
    await answer(simulated_mesh, 3)
    assert time.perf_counter() - began >= TOKENS * STEP_S


async def test_concurrent_requests_spread_over_the_replicas(simulated_mesh: Mesh) -> None:
    steps = [simulated_mesh.metric(f"scheduler-{i}", "steps_total") for i in (0, 1)]
    await asyncio.gather(*(answer(simulated_mesh, seed) for seed in range(8)))
    for index, before in enumerate(steps):
        assert simulated_mesh.metric(f"scheduler-{index}", "steps_total") >= before + TOKENS


def test_no_process_of_a_simulated_mesh_loads_torch(simulated_mesh: Mesh) -> None:
    for service in simulated_mesh.facts["services"]:
        assert "libtorch" not in Path(f"/proc/{service['pid']}/maps").read_text()


def test_blocks_are_free_within_the_window_when_a_client_closes(simulated_mesh: Mesh) -> None:
    def total(metric: str) -> float:
        return sum(simulated_mesh.metric(f"scheduler-{i}", metric) for i in (0, 1))

    with simulated_mesh.openai(max_retries=0) as client:
        stream = client.completions.create(
            model=simulated_mesh.model, prompt="Anything", max_tokens=500, stream=True
        )
        next(iter(stream))
        assert total("num_blocks_used") > 0
        steps = total("steps_total")
        stream.close()
        wait_until(lambda: total("num_blocks_used") == 0, 10)
    # the window, and what began while the cancel was on its way
    assert total("steps_total") <= steps + WINDOW + 2
