"""`infermesh up --deterministic`: a request's text and logprobs have the same bits whether it runs
alone, in a crowd, preempted, over a warm prefix cache, or through the death of its shard, or of its
scheduler, after which another replica goes on with it."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.mesh_process import Mesh, wait_until

NUM_REQUESTS = 10
TOKENS = 40
Answer = tuple[list[int], list[float], list[dict[str, float]]]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Two replicas; chunks of at most 16 tokens, and too few blocks for all that runs."""
    flags = ["max_batch_tokens=16", "max_num_seqs=16", "num_blocks=20", "block_size=8"]
    settings = [word for flag in flags for word in ("--set", f"scheduler.{flag}")]
    folder = tmp_path_factory.mktemp("mesh")
    with Mesh(folder, "--deterministic", "--no-cache", "--replicas", "2", *settings) as running:
        yield running


async def answer(client: openai.AsyncOpenAI, mesh: Mesh, index: int) -> Answer:
    """Token ids, logprobs and top logprobs; prompts of 5 to 68 tokens, every third one greedy."""
    sampling: dict[str, Any] = {"temperature": 0}
    if index % 3:
        sampling = {"temperature": 1.2, "seed": index, "top_p": 0.95}
    reply = await client.completions.create(
        model=mesh.model,
        prompt=[400 + 7 * index + place % 50 for place in range(5 + 7 * index)],
        max_tokens=TOKENS,
        logprobs=4,
        extra_body={"ignore_eos": True, "return_token_ids": True},
        **sampling,
    )
    found = reply.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert len(found.token_logprobs) == TOKENS
    extra = reply.choices[0].model_extra or {}
    return list(extra["token_ids"]), list(found.token_logprobs), list(found.top_logprobs)


async def crowd(mesh: Mesh) -> list[Answer]:
    async with mesh.async_openai(max_retries=0) as client:
        return await asyncio.gather(*(answer(client, mesh, i) for i in range(NUM_REQUESTS)))


@pytest.fixture(scope="module")
def alone(mesh: Mesh) -> list[Answer]:
    """One after another."""

    async def one_by_one() -> list[Answer]:
        async with mesh.async_openai(max_retries=0) as client:
            return [await answer(client, mesh, i) for i in range(NUM_REQUESTS)]

    return asyncio.run(one_by_one())


def test_bits_are_the_same_when_requests_crowd_and_are_preempted(
    mesh: Mesh, alone: list[Answer]
) -> None:
    def total(metric: str) -> float:
        return sum(mesh.metric(f"scheduler-{i}", metric) for i in (0, 1))

    before = total("preemptions_total")
    assert asyncio.run(crowd(mesh)) == alone
    assert total("preemptions_total") > before
    assert total("prefix_cache_hits_total") > 0


@pytest.mark.parametrize("victim", ["shard-0", "scheduler-1"])
def test_bits_are_the_same_when_a_process_is_killed(
    mesh: Mesh, alone: list[Answer], victim: str
) -> None:
    scheduler = victim.replace("shard", "scheduler")

    async def through_a_kill() -> tuple[list[Answer], int]:
        steps = mesh.metric(scheduler, "steps_total")
        running = asyncio.create_task(crowd(mesh))
        await asyncio.to_thread(
            wait_until, lambda: mesh.metric(scheduler, "steps_total") > steps + 30, 60
        )
        assert mesh.metric(scheduler, "num_requests_running") > 0
        pid = mesh.kill(victim)
        return await running, pid

    answers, pid = asyncio.run(through_a_kill())
    assert answers == alone
    mesh.wait_restarted(victim, pid)


def test_cost_of_the_mode_is_printed(mesh: Mesh) -> None:
    assert "deterministic mode: about" in mesh.output.read_text()
