"""What a session still sends before it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator

from infermesh.config import SchedulerConfig
from infermesh.v1 import sampling_pb2
from infermesh.v1 import scheduler_service_pb2 as pb
from services.scheduler.replica import Replica, State
from services.scheduler.session import Session
from tests.model_shard import ModelShard
from tests.unit.scheduler.desk import Desk


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
