"""Work is shared: streams run in one batch, and a common prefix is computed once."""

import asyncio
import time

from tests.e2e.mesh_process import Mesh

STREAMS = 32
TOKENS = 64


async def run_all(mesh: Mesh, prompts: list[list[int]], concurrency: int) -> float:
    """Output tokens per second over all prompts."""
    gate = asyncio.Semaphore(concurrency)
    async with mesh.async_openai(max_retries=0) as client:

        async def one(prompt: list[int]) -> int:
            async with gate:
                stream = await client.completions.create(
                    model=mesh.model,
                    prompt=prompt,
                    max_tokens=TOKENS,
                    temperature=1.0,  # sampled requests are never shared
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"ignore_eos": True},
                )
                return [chunk.usage async for chunk in stream if chunk.usage][-1].completion_tokens

        began = time.perf_counter()
        counts = await asyncio.gather(*(one(prompt) for prompt in prompts))
        return sum(counts) / (time.perf_counter() - began)


def distinct_prompts(salt: int, count: int) -> list[list[int]]:
    return [
        [300 + (salt * 7919 + i * 104729 + j * 31) % 1500 for j in range(24)] for i in range(count)
    ]


async def test_thirty_two_streams_reach_four_times_the_rate_of_one_after_another(
    demo_mesh: Mesh,
) -> None:
    await run_all(demo_mesh, distinct_prompts(0, 4), 4)  # warm
    one_by_one = await run_all(demo_mesh, distinct_prompts(1, 8), 1)
    rows = demo_mesh.metric("scheduler-0", "step_batch_size_sum")
    steps = demo_mesh.metric("scheduler-0", "step_batch_size_count")
    together = await run_all(demo_mesh, distinct_prompts(2, STREAMS), STREAMS)
    rows = demo_mesh.metric("scheduler-0", "step_batch_size_sum") - rows
    steps = demo_mesh.metric("scheduler-0", "step_batch_size_count") - steps
    assert together >= 4 * one_by_one
    assert rows / steps > STREAMS / 2


async def test_shared_prefix_of_thirty_two_chats_is_computed_once(demo_mesh: Mesh) -> None:
    system = " ".join(f"Rule {i}: answer in one short sentence." for i in range(30))
    computed = demo_mesh.metric("scheduler-0", "prompt_tokens_computed_total")
    asked = demo_mesh.metric("scheduler-0", "prompt_tokens_total")
    async with demo_mesh.async_openai(max_retries=0) as client:

        async def one(index: int) -> int:
            answer = await client.chat.completions.create(
                model=demo_mesh.model,
                messages=[
                    {"role": "system", "content": system},
                    {"role": "user", "content": f"What is {index} plus 1?"},
                ],
                temperature=0,
                max_tokens=8,
            )
            return answer.usage.prompt_tokens

        lengths = await asyncio.gather(*(one(index) for index in range(STREAMS)))
    computed = demo_mesh.metric("scheduler-0", "prompt_tokens_computed_total") - computed
    asked = demo_mesh.metric("scheduler-0", "prompt_tokens_total") - asked
    assert asked == sum(lengths)
    # the prefix once, and of each chat at most its own question and a partial block
    assert computed <= min(lengths) + STREAMS * 48
    assert computed < asked / 4
