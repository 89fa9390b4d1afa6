"""What a session sends: packed for a gateway that reads it, and all of it before it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator

from infermesh.config import SchedulerConfig
from infermesh.v1 import sampling_pb2
from infermesh.v1 import scheduler_service_pb2 as pb
from services.scheduler.outbox import Outbox
from services.scheduler.replica import Replica, State
from services.scheduler.sequence import Request, Timeline
from services.scheduler.session import Session
from tests.model_shard import ModelShard
from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.scene import make_request


async def one_submit() -> AsyncIterator[pb.SessionRequest]:
    submit = pb.Submit(
        stream_id=1,
        prompt_token_ids=[2, 3],
        choices=[pb.ChoiceState()],
        sampling=sampling_pb2.SamplingParams(seed=1, temperature=1.0),
        stop=sampling_pb2.StopConditions(max_tokens=4, ignore_eos=True),
    )
    yield pb.SessionRequest(submit=submit)


async def test_session_sends_the_last_tokens_when_they_come_while_a_message_goes_out() -> None:
    desk = Desk(ModelShard())
    replica = Replica(SchedulerConfig(address="unix:scheduler", shard="unix:shard", model="model"))
    replica.batcher = desk.batcher
    replica.move_to(State.SERVING)
    session = Session(replica)
    messages = session.messages()
    assert (await anext(messages)).HasField("ready")
    await session.read(one_submit())  # and half-closes
    assert (await anext(messages)).accepted
    desk.run()
    last = await anext(messages)
    assert len(last.deltas[0].token_ids) == 4
    assert last.finished[0].reason == sampling_pb2.FINISH_REASON_LENGTH
    assert [rest async for rest in messages] == []


def outbox(max_unread: int = 100) -> Outbox:
    """Of a gateway that reads packed tokens."""
    made = Outbox(max_unread, lambda request: None, lambda request: None)
    made.packs_tokens = True
    return made


def running(stream_id: int, n: int = 1) -> Request:
    """A request whose choices have had their first tokens a while ago."""
    request = make_request(stream_id, [2, 3], n=n)
    for sequence in request.sequences:
        sequence.timeline = Timeline(0.0, first_step_s=1.0, first_token_s=2.0, last_token_s=3.0)
    return request


async def test_tokens_with_nothing_beside_them_are_packed_when_the_gateway_reads_it() -> None:
    box, pair, other = outbox(), running(7, n=2), running(9)
    for sequence, start, token_id in (
        (pair.sequences[1], 4, 60),
        (other.sequences[0], 0, 61),
        (pair.sequences[1], 5, 62),
    ):
        sequence.device_us += 1.75
        assert box.delta(sequence, start, [token_id], [])
    box.flush()
    message = await box.take()
    assert message is not None
    assert not message.deltas
    assert message.tokens == pb.PackedTokens(
        stream_ids=[7, 9, 7],
        choices=[1, 0, 1],
        starts=[4, 0, 5],
        token_ids=[60, 61, 62],
        device_us=[1, 1, 2],  # whole ones: the rest is told with the next
    )
    assert await empty(box)


async def test_first_token_and_logprobs_have_a_delta_of_their_own_when_others_are_packed() -> None:
    box, first, rated, plain = outbox(), make_request(1, [2]), running(2), running(3)
    first.sequences[0].timeline = Timeline(0.0, 1.0, first_token_s=2.0, last_token_s=2.0)
    logprobs = [sampling_pb2.TokenLogprobs(logprob=-1.0)]
    box.delta(first.sequences[0], 0, [60], [])
    box.delta(rated.sequences[0], 5, [61], logprobs)
    box.delta(plain.sequences[0], 6, [62], [])
    box.flush()
    message = await box.take()
    assert message is not None
    assert [(one.stream_id, list(one.token_ids)) for one in message.deltas] == [
        (1, [60]),
        (2, [61]),
    ]
    assert message.deltas[0].HasField("timings")
    assert message.deltas[1].logprobs == logprobs
    assert list(message.tokens.token_ids) == [62]


async def test_packed_tokens_count_as_unread_when_the_gateway_is_slow() -> None:
    box, slow, other = outbox(max_unread=3), running(1), running(2)
    for start in range(3):
        assert box.delta(slow.sequences[0], start, [60], [])
    assert box.delta(other.sequences[0], 0, [60], [])
    assert not box.delta(slow.sequences[0], 3, [60], [])
    box.flush()
    await box.take()
    assert box.delta(slow.sequences[0], 4, [60], [])  # all is read


async def empty(box: Outbox) -> bool:
    """The next message has nothing in it."""
    box.flush()
    return await box.take() is None
