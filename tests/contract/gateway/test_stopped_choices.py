"""A choice that a stop string ended is computed no further; its siblings are."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from infermesh.errors import ReplicaUnavailable
from infermesh.v1 import scheduler_service_pb2 as pb
from tests.fake_scheduler import FakeScheduler
from tests.fake_stream import words
from tests.gateway_process import Edge, make_replicas, running_gateway
from tests.tiny_tokenizer import byte_level

ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 60,
    "temperature": 0,
    "n": 2,
    "stream": True,
}
STOP = "of choice 0"  # choice 1 never says it


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Edge]:
    async with running_gateway(tmp_path, make_replicas(tmp_path, 2)) as edge:
        yield edge


def whole(choice: int) -> str:
    text: str = byte_level().decode(words(pb.Submit(), choice)[:60])
    return text


class Seen:
    """What a client has of each choice."""

    def __init__(self, stream: Any) -> None:
        self.texts = {0: "", 1: ""}
        self.reasons: dict[int, str] = {}
        self.stream = stream

    async def until(self, num_chars: int = 10**6, stopped: int | None = None) -> None:
        """Until every choice is that long, or one has ended; else to the end."""
        async for chunk in self.stream:
            for choice in chunk.choices:
                self.texts[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    self.reasons[choice.index] = choice.finish_reason
            if stopped in self.reasons or min(map(len, self.texts.values())) >= num_chars:
                return


async def opened(edge: Edge, request_id: str, **options: Any) -> Seen:
    stream = await edge.openai.chat.completions.create(
        **ASK, **options, extra_headers={"x-request-id": request_id}
    )
    return Seen(stream)


def go_on(replica: FakeScheduler) -> None:
    replica.gated = False
    replica._wake.set()


async def test_choice_is_cancelled_alone_when_a_stop_string_ended_it(edge: Edge) -> None:
    edge.replica.gated = True
    seen = await opened(edge, "stopper", stop=STOP)
    await edge.replica.step(20)
    await edge.replica.wait(lambda: edge.replica.cancelled == [("stopper", 0)])
    go_on(edge.replica)
    await seen.until()
    assert seen.texts == {0: whole(0)[: whole(0).index(STOP)], 1: whole(1)}
    assert seen.reasons == {0: "stop", 1: "length"}
    assert len(edge.replica.submits) == 1
    assert edge.replica.cancelled == [("stopper", 0)]


async def test_choice_goes_on_when_another_reader_wants_it(edge: Edge) -> None:
    edge.replica.gated = True
    plain = await opened(edge, "plain")
    cut = await opened(edge, "cut", stop=STOP)
    assert len(edge.replica.submits) == 1
    await edge.replica.step(20)
    await cut.until(stopped=0)
    await edge.replica.step(20)
    await plain.until(num_chars=len(byte_level().decode(words(pb.Submit(), 0)[:39])))
    assert edge.replica.cancelled == []
    await plain.stream.close()
    await edge.replica.wait(lambda: edge.replica.cancelled == [("plain", 0)])
    go_on(edge.replica)
    await cut.until()
    assert cut.texts[1] == whole(1)


async def test_newcomer_starts_anew_when_a_choice_was_dropped(edge: Edge) -> None:
    edge.replica.gated = True
    cut = await opened(edge, "cut", stop=STOP)
    await edge.replica.step(20)
    await edge.replica.wait(lambda: len(edge.replica.cancelled) == 1)
    late = await opened(edge, "late")
    assert len(edge.replica.submits) == 2
    go_on(edge.replica)
    await late.until()
    assert late.texts == {0: whole(0), 1: whole(1)}
    await cut.until()


async def test_choice_that_was_dropped_is_not_resubmitted(two: Edge) -> None:
    for replica in two.replicas:
        replica.gated = True
    seen = await opened(two, "stopper", stop=STOP)
    first = next(replica for replica in two.replicas if replica.num_streams)
    other = next(replica for replica in two.replicas if replica is not first)
    await first.step(20)
    await first.wait(lambda: first.cancelled == [("stopper", 0)])
    go_on(other)
    await first.break_sessions(ReplicaUnavailable("gone"))
    await seen.until()
    assert seen.texts == {0: whole(0)[: whole(0).index(STOP)], 1: whole(1)}
    assert [choice.index for choice in other.submits[0].choices] == [1]
