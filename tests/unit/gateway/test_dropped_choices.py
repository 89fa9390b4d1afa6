"""Choices that no reader wants any more: who still does, and what their end does to the rest."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast
from unittest.mock import Mock

from gateway.attempt import Adopted, AttemptSink, Journey
from gateway.driving import Driving
from gateway.failover import Driver
from gateway.fleet import Fleet
from gateway.generation import Generation
from gateway.replica.admittance import Admittance
from gateway.replica.client import Attempt
from gateway.replica.session import Session, Sink, StreamId
from gateway.replica.translate import Submission
from gateway.request import Resumable
from gateway.tokens import Finish, FinishReason
from infermesh.errors import MeshError, ReplicaUnavailable
from infermesh.v1 import scheduler_service_pb2 as pb
from tests.unit.gateway.jobs import job

END = Finish(FinishReason.LENGTH)


def generation(num_choices: int = 2) -> tuple[Generation, list[int]]:
    """With the choices that it drops."""
    one = Generation(job(num_choices=num_choices), clock=lambda: 0.0)
    dropped: list[int] = []
    one.on_dropped = dropped.append
    return one, dropped


def test_choice_is_dropped_when_its_last_reader_declines_it() -> None:
    one, dropped = generation()
    readers = [one.join(asyncio.Event(), 99) for _ in range(2)]
    readers[0].decline(1)
    assert dropped == []
    readers[1].decline(1)
    readers[1].decline(1)
    assert dropped == [1]
    assert one.open_choices() == [0]
    assert not one.joinable


def test_choice_is_dropped_when_the_reader_that_wanted_it_leaves() -> None:
    one, dropped = generation()
    wants_all, declines = (one.join(asyncio.Event(), 99) for _ in range(2))
    declines.decline(0)
    wants_all.close()
    assert dropped == [0]
    assert not one.ended


def test_generation_ends_when_what_is_left_was_dropped() -> None:
    one, dropped = generation()
    reader = one.join(asyncio.Event(), 99)
    one.finish(0, END)
    reader.decline(0)  # it has ended by itself
    assert dropped == []
    reader.decline(1)
    assert dropped == [1]
    assert one.ended


class FakeReplica:
    """Takes submissions for a session that is never opened, and keeps their sinks."""

    replica_id = "replica"
    address = "unix:replica"

    def __init__(self) -> None:
        self.submissions: list[Submission] = []
        self.sinks: list[Sink] = []
        self.calls: list[Any] = []
        self.submitted = asyncio.Event()
        self.admittance = Admittance()

    def submit(self, submission: Submission, sink: Sink) -> "FakeReplica":
        self.submissions.append(submission)
        self.sinks.append(sink)
        self.submitted.set()
        return self

    def cancel(self) -> None:
        self.calls.append("cancel")

    def release(self) -> None:
        self.calls.append("release")

    def cancel_choice(self, choice: int) -> None:
        self.calls.append(choice)


class FakeFleet:
    """One replica, there or not."""

    clients = ()

    def __init__(self) -> None:
        self.replica = FakeReplica()
        self.is_there = True
        self.waiting = asyncio.Event()
        self.news = asyncio.Event()
        self.listeners: set[object] = set()

    async def prepare(self, *_: object) -> None: ...

    def pick(self, *_: object) -> FakeReplica | None:
        return self.replica if self.is_there else None

    def why_none(self, *_: object) -> MeshError:
        return ReplicaUnavailable("none")

    def may_return(self, *_: object) -> bool:
        return True

    async def changed(self, timeout_s: float) -> None:
        self.waiting.set()
        await self.news.wait()


async def test_attempt_ends_and_is_cancelled_when_what_is_left_was_dropped() -> None:
    one, _ = generation()
    reader = one.join(asyncio.Event(), 99)
    fleet = FakeFleet()
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        tasks.create_task(Driver(Journey(one, cast(Fleet, fleet), lambda: 0.0)).run())
        await fleet.replica.submitted.wait()
        (sink,) = fleet.replica.sinks
        sink.on_accepted()
        reader.decline(0)
        sink.on_delta(0, 17, [3], ())  # late; its replica had not heard of it
        sink.on_finished(0, Finish(FinishReason.CANCELLED))
        sink.on_finished(0, ReplicaUnavailable("late, too"))
        assert not one.ended
        reader.decline(1)
    assert fleet.replica.calls == [0, 1, "cancel"]
    assert one.error is None


async def test_nothing_is_submitted_when_all_was_dropped_while_no_replica_was_there() -> None:
    one, _ = generation()
    reader = one.join(asyncio.Event(), 99)
    fleet = FakeFleet()
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        tasks.create_task(Driver(Journey(one, cast(Fleet, fleet), lambda: 0.0)).run())
        await fleet.replica.submitted.wait()
        fleet.replica.sinks[0].on_accepted()
        fleet.is_there = False
        fleet.replica.sinks[0].on_broken(ReplicaUnavailable("gone"))
        await fleet.waiting.wait()
        reader.decline(0)
        reader.decline(1)
        fleet.is_there = True
        fleet.news.set()
    assert len(fleet.replica.submissions) == 1
    assert one.error is None


class Call:
    """A stream whose peer says nothing."""

    def __init__(self, requests: AsyncIterator[pb.SessionRequest]) -> None:
        self.requests = requests

    def __aiter__(self) -> "Call":
        return self

    async def __anext__(self) -> pb.SessionResponse:
        return await asyncio.get_running_loop().create_future()

    def cancel(self) -> None: ...


async def test_session_sends_no_submit_of_a_choice_that_was_dropped_before() -> None:
    calls: asyncio.Queue[Call] = asyncio.Queue()

    def open_stream(requests: AsyncIterator[pb.SessionRequest]) -> Call:
        calls.put_nowait(call := Call(requests))
        return call

    session = Session(open_stream)
    sink = cast(Sink, FakeReplica())
    delivered = [(0, [5]), (1, [6])]
    first = session.submit(Submission(job(num_choices=2), 0, delivered, None), sink)
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(session.run(lambda: None))
        session.cancel_choice(first, 0)
        sent = aiter((await calls.get()).requests)
        submit = (await anext(sent)).submit
        assert [(c.index, list(c.output_token_ids)) for c in submit.choices] == [(1, [6])]
        session.cancel_choice(StreamId(99), 0)  # over: nothing is said
        session.cancel_choice(first, 1)
        cancel = (await anext(sent)).cancel
        assert (cancel.stream_id, list(cancel.choices)) == (first, [1])
        session.cancel_choice(first, 1)
        session.cancel(first)
        assert list((await anext(sent)).cancel.choices) == []
        running.cancel()


async def test_adopted_attempt_is_let_go_when_its_generation_ends_before_its_driver_began() -> None:
    one = Generation(job(resumable=Resumable(b"key", b"digest", "record")), lambda: 0.0)
    fleet = FakeFleet()
    sink = AttemptSink(Journey(one, cast(Fleet, fleet), lambda: 0.0), cast(Any, fleet.replica))
    attempt = Mock(spec=Attempt)
    async with asyncio.TaskGroup() as tasks:
        driving = Driving(cast(Fleet, fleet), tasks.create_task, lambda _: None, lambda: 0.0)
        driving.begin(one, Adopted(cast(Any, fleet.replica), attempt, sink))
        one.join(asyncio.Event(), 99).close()
    attempt.cancel.assert_called_once_with()
