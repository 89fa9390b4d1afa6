"""A replica with one place: requests wait for it, and leave no trace when their clients go."""

from collections.abc import AsyncIterator, Iterator

import openai
import pytest

from infermesh.mesh.models import DEMO_MODEL_ID
from tests.e2e.mesh_process import Mesh, wait_until

MANY_TOKENS = 1200


@pytest.fixture(scope="module")
def narrow_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """The demo model, one sequence at a time, room in the queue for one prompt of this page."""
    flags = ("--no-cache", "--set", "scheduler.max_num_seqs=1")
    flags += ("--set", "scheduler.max_queue_tokens=100")
    with Mesh(tmp_path_factory.mktemp("narrow"), *flags) as mesh:
        yield mesh


@pytest.fixture
async def client(narrow_mesh: Mesh) -> AsyncIterator[openai.AsyncOpenAI]:
    async with narrow_mesh.async_openai(max_retries=0) as made:
        yield made


async def stream_of(
    client: openai.AsyncOpenAI, first_token: int, max_tokens: int = MANY_TOKENS
) -> openai.AsyncStream:
    """A stream that is admitted; its prompt of 60 tokens is like no other's."""
    return await client.completions.create(
        model=DEMO_MODEL_ID,
        prompt=[first_token, *range(400, 459)],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        extra_body={"ignore_eos": True},
    )


def waiting(mesh: Mesh) -> float:
    return mesh.metric("scheduler-0", "num_requests_waiting")


def blocks_used(mesh: Mesh) -> float:
    return mesh.metric("scheduler-0", "num_blocks_used")


async def test_queued_request_is_gone_when_its_client_closes(
    narrow_mesh: Mesh, client: openai.AsyncOpenAI
) -> None:
    running = await stream_of(client, 310)
    await anext(aiter(running))
    queued = await stream_of(client, 311)  # admitted to the queue: headers are there
    wait_until(lambda: waiting(narrow_mesh) == 1, 10)
    computed = narrow_mesh.metric("scheduler-0", "prompt_tokens_computed_total")
    await queued.close()
    wait_until(lambda: waiting(narrow_mesh) == 0, 10)
    assert narrow_mesh.metric("scheduler-0", "num_requests_running") == 1
    await running.close()
    wait_until(lambda: blocks_used(narrow_mesh) == 0, 10)
    # it held no block and no step was spent on it
    assert narrow_mesh.metric("scheduler-0", "prompt_tokens_computed_total") == computed


async def test_request_is_refused_with_a_time_when_the_queue_is_full(
    narrow_mesh: Mesh, client: openai.AsyncOpenAI
) -> None:
    running = await stream_of(client, 320)
    await anext(aiter(running))
    queued = await stream_of(client, 321)
    wait_until(lambda: waiting(narrow_mesh) == 1, 10)
    with pytest.raises(openai.RateLimitError) as refused:
        await stream_of(client, 322)
    assert refused.value.code == "queue_full"
    assert float(refused.value.response.headers["retry-after"]) > 0
    await queued.close()
    await running.close()
    wait_until(lambda: blocks_used(narrow_mesh) == 0, 10)


async def test_queued_request_runs_when_its_turn_comes(client: openai.AsyncOpenAI) -> None:
    running = await stream_of(client, 330, max_tokens=100)
    queued = await stream_of(client, 331, max_tokens=5)
    chunks = [chunk async for chunk in queued]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert [chunk async for chunk in running][-1].choices[0].finish_reason == "length"
