"""Replicas are lost in mid-stream; their streams go on with no token lost and none twice."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from infermesh.errors import Draining, ModelLoading, ReplicaUnavailable
from infermesh.v1 import scheduler_service_pb2 as pb
from tests.fake_scheduler import FakeScheduler
from tests.fake_stream import words
from tests.gateway_process import Edge, make_replicas, running_gateway
from tests.tiny_tokenizer import byte_level

ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 60,
}


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Edge]:
    async with running_gateway(tmp_path, make_replicas(tmp_path, 2)) as edge:
        yield edge


def undisturbed(choice: int = 0, count: int = 60) -> str:
    text: str = byte_level().decode(words(pb.Submit(), choice)[:count])
    return text


async def read(stream: Any) -> tuple[dict[int, str], dict[int, str]]:
    """Texts and finish reasons by choice."""
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return texts, reasons


def holder(edge: Edge) -> FakeScheduler:
    """The replica that has the request."""
    return next(replica for replica in edge.replicas if replica.num_streams)


async def test_stream_moves_to_the_other_replica_when_its_session_breaks(two: Edge) -> None:
    for replica in two.replicas:
        replica.gated = True
    stream = await two.openai.chat.completions.create(**ASK, stream=True, seed=5)
    first = holder(two)
    await first.step(17)
    other = next(replica for replica in two.replicas if replica is not first)
    other.gated = False
    await first.kill()
    texts, reasons = await read(stream)
    assert texts == {0: undisturbed()}
    assert reasons == {0: "length"}
    before, after = first.submits[0], other.submits[0]
    assert (before.attempt, after.attempt) == (0, 1)
    assert before.request_id == after.request_id
    assert after.prompt_token_ids == before.prompt_token_ids
    delivered = list(after.choices[0].output_token_ids)
    assert delivered == words(before, 0)[: len(delivered)]
    assert after.sampling == before.sampling
    await first.start()


async def test_drawn_seed_is_kept_across_attempts(two: Edge) -> None:
    for replica in two.replicas:
        replica.gated = True
    stream = await two.openai.chat.completions.create(**ASK, stream=True)
    first = holder(two)
    await first.step(3)
    other = next(replica for replica in two.replicas if replica is not first)
    other.gated = False
    await first.break_sessions(ReplicaUnavailable("gone"))
    await read(stream)
    assert first.submits[0].sampling.seed == other.submits[0].sampling.seed != 0


async def test_stream_waits_for_its_only_replica_to_come_back(edge: Edge) -> None:
    edge.replica.gated = True
    stream = await edge.openai.chat.completions.create(**ASK, stream=True)
    await edge.replica.step(9)
    await edge.replica.kill()
    await edge.routable(0)
    edge.replica.gated = False
    await edge.replica.start()
    texts, _ = await read(stream)
    assert texts == {0: undisturbed()}


async def test_only_unfinished_choices_are_resubmitted(two: Edge) -> None:
    def script(submit: pb.Submit, choice: int) -> list[int]:
        return words(submit, choice)[: 5 if choice == 0 else 60]

    for replica in two.replicas:
        replica.gated = True
        replica.script = script
    stream = await two.openai.chat.completions.create(**ASK, n=2, stream=True)
    first = holder(two)
    await first.step(12)
    other = next(replica for replica in two.replicas if replica is not first)
    other.gated = False
    await two.routable(2)
    await first.break_sessions(ReplicaUnavailable("gone"))
    texts, reasons = await read(stream)
    assert texts == {0: undisturbed(0, 5), 1: undisturbed(1, 60)}
    assert reasons == {0: "length", 1: "length"}
    assert [choice.index for choice in other.submits[0].choices] == [1]


async def test_whole_answer_survives_a_break_too(two: Edge) -> None:
    for replica in two.replicas:
        replica.gated = True
    asking = asyncio.create_task(two.openai.chat.completions.create(**ASK))
    waits = [r.wait(lambda r=r: r.num_streams == 1) for r in two.replicas]  # type: ignore[misc]
    await next(asyncio.as_completed(waits))
    first = holder(two)
    await first.step(20)
    for replica in two.replicas:
        replica.gated = False
    await first.break_sessions(ReplicaUnavailable("gone"))
    answer = await asking
    assert answer.choices[0].message.content == undisturbed()
    assert answer.usage.completion_tokens == 60


async def test_keep_alives_go_out_while_a_stream_waits_for_its_replica(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, make_replicas(tmp_path), keepalive_s=0.05) as edge:
        edge.replica.gated = True
        body = {**ASK, "stream": True}
        async with edge.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.aiter_lines()
            await edge.replica.step(3)
            await edge.replica.kill()
            async for line in lines:
                if line == ": keep-alive":
                    break
            edge.replica.gated = False
            await edge.replica.start()
            text = ""
            async for line in lines:
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        assert undisturbed().endswith(text)
        assert text


async def test_request_that_breaks_three_replicas_without_a_token_is_poisoned(edge: Edge) -> None:
    edge.replica.gated = True
    stream = await edge.openai.chat.completions.create(**ASK, stream=True)
    await edge.replica.step()
    for attempt in range(3):
        await edge.replica.wait(lambda n=attempt: len(edge.replica.submits) == n + 1)  # type: ignore[misc]
        await edge.replica.break_sessions(ReplicaUnavailable("crash"))
    with pytest.raises(openai.APIError) as caught:
        await read(stream)
    assert caught.value.code == "poisoned"
    assert [submit.attempt for submit in edge.replica.submits] == [0, 1, 2]
    assert [submit.num_crashes for submit in edge.replica.submits] == [0, 1, 2]


async def test_stream_survives_any_number_of_crashes_when_it_gets_tokens(edge: Edge) -> None:
    edge.replica.gated = True
    stream = await edge.openai.chat.completions.create(**ASK, stream=True)
    reading = asyncio.create_task(read(stream))
    for attempt in range(4):
        await edge.replica.wait(lambda n=attempt: len(edge.replica.submits) == n + 1)  # type: ignore[misc]
        await edge.replica.step()
        await edge.replica.break_sessions(ReplicaUnavailable("crash"))
    await edge.replica.wait(lambda: len(edge.replica.submits) == 5)
    edge.replica.gated = False
    edge.replica._wake.set()
    texts, _ = await reading
    assert texts == {0: undisturbed()}
    assert max(submit.num_crashes for submit in edge.replica.submits) <= 1


@pytest.mark.parametrize("refusal", [ModelLoading("loading"), Draining("draining")])
async def test_refusal_before_the_first_token_tries_the_other_replica(
    two: Edge, refusal: ModelLoading | Draining
) -> None:
    two.replicas[0].refusal = refusal
    for _ in range(6):
        answer = await two.openai.chat.completions.create(**ASK)
        assert answer.choices[0].message.content == undisturbed()
    assert len(two.replicas[1].submits) == 6


@pytest.mark.parametrize("cause", [ReplicaUnavailable("its shard is lost"), Draining("stopping")])
async def test_stream_moves_when_its_replica_gives_it_up(
    two: Edge, cause: ReplicaUnavailable | Draining
) -> None:
    for replica in two.replicas:
        replica.gated = True
    stream = await two.openai.chat.completions.create(**ASK, stream=True)
    first = holder(two)
    await first.step(7)
    other = next(replica for replica in two.replicas if replica is not first)
    other.gated = False
    first.give_up(cause)
    texts, _ = await read(stream)
    assert texts == {0: undisturbed()}
    assert [submit.attempt for submit in (*first.submits, *other.submits)] == [0, 1]


async def test_stream_survives_any_number_of_drains(edge: Edge) -> None:
    edge.replica.gated = True
    stream = await edge.openai.chat.completions.create(**ASK, stream=True)
    for attempt in range(5):
        await edge.replica.wait(lambda n=attempt: len(edge.replica.submits) == n + 1)  # type: ignore[misc]
        await edge.replica.step()
        edge.replica.give_up(Draining("rolled"))
    await edge.replica.wait(lambda: len(edge.replica.submits) == 6)
    edge.replica.gated = False
    edge.replica._wake.set()
    texts, _ = await read(stream)
    assert texts == {0: undisturbed()}


async def test_stream_ends_when_its_only_replica_has_failed_for_good(edge: Edge) -> None:
    edge.replica.gated = True
    stream = await edge.openai.chat.completions.create(**ASK, stream=True)
    await edge.replica.step(2)
    await edge.replica.set_state(pb.REPLICA_STATE_FAILED)
    await edge.routable(0)
    edge.replica.give_up(ReplicaUnavailable("its shard is lost"))
    with pytest.raises(openai.APIError) as caught:
        await read(stream)
    assert caught.value.code == "replica_unavailable"


async def test_replicas_of_one_name_share_the_requests(tmp_path: Path) -> None:
    replicas = make_replicas(tmp_path, 2)
    for replica in replicas:
        replica.replica_id = "replica-0"
        replica.gated = True
    async with running_gateway(tmp_path, replicas) as edge:
        streams = [
            await edge.openai.chat.completions.create(**ASK, stream=True, seed=seed)
            for seed in range(4)
        ]
        assert [len(replica.submits) for replica in replicas] == [2, 2]
        for stream in streams:
            await stream.close()


async def test_draining_replica_gets_no_new_requests(two: Edge) -> None:
    await two.replicas[0].set_state(pb.REPLICA_STATE_DRAINING)
    await two.routable(1)
    for _ in range(6):
        await two.openai.chat.completions.create(**ASK)
    assert two.replicas[0].submits == []


async def test_recovering_replica_still_gets_requests(edge: Edge) -> None:
    await edge.replica.set_state(pb.REPLICA_STATE_RECOVERING)
    await edge.openai.chat.completions.create(**ASK)
    assert len(edge.replica.submits) == 1


async def test_busy_replica_is_avoided(two: Edge) -> None:
    two.replicas[0].num_tokens_waiting = 10_000
    await two.replicas[0].set_state(pb.REPLICA_STATE_SERVING)
    async with asyncio.timeout(10):
        while not any(c.view.load.num_tokens_waiting for c in two.service.fleet.clients):
            await two.service.fleet.changed(1.0)
    for _ in range(5):
        await two.openai.chat.completions.create(**ASK)
    assert two.replicas[0].submits == []


async def test_stream_is_not_continued_by_other_weights(tmp_path: Path) -> None:
    replicas = make_replicas(tmp_path, 2)
    replicas[1].fingerprint = "other weights"
    async with running_gateway(tmp_path, replicas) as edge:
        for replica in replicas:
            replica.gated = True
        stream = await edge.openai.chat.completions.create(**ASK, stream=True)
        first = holder(edge)
        other = next(replica for replica in replicas if replica is not first)
        await first.step(5)
        await first.kill()
        await edge.routable(1)
        first.gated = False
        await first.start()
        texts, _ = await read(stream)
        assert texts == {0: undisturbed()}
        assert other.submits == []


async def test_gap_in_the_deltas_is_never_shown_to_a_client(edge: Edge) -> None:
    """A replica that skips a token is left, and the stream resumed from what was whole."""
    edge.replica.gated = True
    stream = await edge.openai.chat.completions.create(**ASK, stream=True)
    await edge.replica.step(4)
    (held,) = edge.replica._streams.values()
    held.positions[0] += 1
    await edge.replica.step(2)
    edge.replica.gated = False
    await edge.replica.wait(lambda: len(edge.replica.submits) == 2)
    edge.replica._wake.set()
    texts, _ = await read(stream)
    assert texts == {0: undisturbed()}
    assert len(edge.replica.submits[1].choices[0].output_token_ids) == 4
