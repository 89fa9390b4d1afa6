"""Epochs, windows and order of the step stream, by hand-driven worker and loop."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from infermesh.errors import Internal, MeshError, ProtocolViolation, StaleEpoch
from services.shard.domain import Epoch, Step, StepId, StepOutcome, Timings
from services.shard.epoch import EpochGate
from services.shard.sessions import EpochSession, StepStreams


def _step(epoch: int, step_id: int) -> Step:
    return Step(Epoch(epoch), StepId(step_id))


def test_gate_refuses_an_epoch_when_it_is_not_above_the_current() -> None:
    gate = EpochGate()
    old = gate.open(Epoch(4), 2)
    for epoch in (3, 4):
        with pytest.raises(StaleEpoch) as caught:
            gate.open(Epoch(epoch), 2)
        assert caught.value.metadata == {"epoch": "4"}
    gate.open(Epoch(9), 2)
    assert isinstance(old.closed_by, StaleEpoch)
    with pytest.raises(StaleEpoch):
        old.accept(_step(4, 1))


@pytest.mark.parametrize("window", [0, 65])
def test_gate_refuses_a_window_when_it_is_out_of_range(window: int) -> None:
    with pytest.raises(ProtocolViolation, match="window"):
        EpochGate().open(Epoch(1), window)


def test_epoch_refuses_a_step_when_the_window_is_full() -> None:
    state = EpochGate().open(Epoch(1), 2)
    state.accept(_step(1, 1))
    state.accept(_step(1, 2))
    with pytest.raises(ProtocolViolation, match="window"):
        state.accept(_step(1, 3))
    state.answer(StepId(1))
    state.accept(_step(1, 3))


class HandWorker:
    """Jobs run when the test says so."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []

    def submit(self, job: Any, step_tokens: int = 0) -> None:
        self.jobs.append(job)

    def take_idle_s(self) -> float:
        return 0.0


class RecordingRunner:
    """Stands for the slots and the engine."""

    def __init__(self) -> None:
        self.executed: list[tuple[int, int]] = []
        self.num_executed = 0
        self.fail_next = False

    def reset(self) -> None:
        """The slots' own test looks at this."""

    def execute(self, step: Step, idle_s: float) -> StepOutcome:
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("boom")
        self.executed.append((step.epoch, step.step_id))
        return StepOutcome(step.epoch, step.step_id, (), Timings(0, 0, 0))


class StreamMachine(RuleBasedStateMachine):
    """Several clients open epochs, send steps, cancel and half-close, while the worker lags."""

    @initialize()
    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.worker = HandWorker()
        self.runner = RecordingRunner()
        residency: Any = SimpleNamespace(model=object())
        self.streams = self._run(self._make(residency))
        self.streams._runner = self.runner  # type: ignore[assignment]
        self.epoch = 0
        self.sent = 0
        self.session: EpochSession | None = None
        self.results: dict[int, list[int]] = {}
        self.ends: dict[int, BaseException | None] = {}
        self.readers: list[asyncio.Task[None]] = []
        self.half_closed = False
        # Number of steps executed in an epoch when it was closed: none may follow.
        self.executed_at_close: dict[int, int] = {}

    async def _make(self, residency: Any) -> StepStreams:
        return StepStreams(self.worker, residency)  # type: ignore[arg-type]

    def _run(self, awaitable: Any) -> Any:
        return self.loop.run_until_complete(awaitable)

    def _spin(self) -> None:
        for _ in range(4):
            self._run(asyncio.sleep(0))

    def _executed(self, epoch: int) -> int:
        return sum(1 for e, _ in self.runner.executed if e == epoch)

    async def _read(self, session: EpochSession) -> None:
        try:
            async for outcome in session.outcomes():
                self.results[session.epoch].append(outcome.step_id)
        except MeshError as error:
            self.ends[session.epoch] = error
        else:
            self.ends[session.epoch] = None

    @rule(jump=st.integers(1, 3), window=st.integers(1, 3))
    def open(self, jump: int, window: int) -> None:
        old = self.epoch
        self.epoch += jump
        task = self.loop.create_task(self.streams.open(Epoch(self.epoch), window))
        self._spin()
        self.executed_at_close.setdefault(old, self._executed(old))
        while not task.done():  # its reset stands behind what is queued
            self.work()
        self.session = task.result()
        self.sent, self.half_closed = 0, False
        self.results[self.epoch] = []
        self.readers.append(self.loop.create_task(self._read(self.session)))
        self._spin()

    @precondition(lambda self: self.epoch > 0)
    @rule(back=st.integers(0, 2))
    def open_stale(self, back: int) -> None:
        with pytest.raises(StaleEpoch) as caught:
            self._run(self.streams.open(Epoch(max(0, self.epoch - back)), 1))
        assert caught.value.metadata["epoch"] == str(self.epoch)

    def _can_send(self) -> bool:
        return self.session is not None and not self.session.closed and not self.half_closed

    @precondition(_can_send)
    @rule()
    def send(self) -> None:
        assert self.session is not None
        answered = len(self.results[self.epoch])
        step = _step(self.epoch, self.sent + 1)
        if self.sent - answered >= self.session._state.window:
            with pytest.raises(ProtocolViolation):
                self.session.submit(step)
            return
        self.session.submit(step)
        self.sent += 1

    @precondition(_can_send)
    @rule(gap=st.sampled_from([0, 2, 3]))
    def send_out_of_order(self, gap: int) -> None:
        assert self.session is not None
        with pytest.raises(ProtocolViolation):
            self.session.submit(_step(self.epoch, self.sent + gap))

    @precondition(_can_send)
    @rule()
    def half_close(self) -> None:
        assert self.session is not None
        self.session.half_close()
        self.half_closed = True
        self._spin()

    @precondition(lambda self: self.session is not None)
    @rule()
    def cancel(self) -> None:
        assert self.session is not None
        self.session.close()
        self.executed_at_close.setdefault(self.epoch, self._executed(self.epoch))
        self._spin()

    @precondition(lambda self: self.worker.jobs)
    @rule()
    def fail(self) -> None:
        self.runner.fail_next = True
        # The next job starts before the loop has heard of the failure.
        for job in [self.worker.jobs.pop(0) for _ in self.worker.jobs[:2]]:
            job()
        self.runner.fail_next = False
        self._note_failures()

    @precondition(lambda self: self.worker.jobs)
    @rule()
    def work(self) -> None:
        self.worker.jobs.pop(0)()
        self._note_failures()

    def _note_failures(self) -> None:
        self._spin()
        for epoch, end in self.ends.items():
            if isinstance(end, Internal):
                self.executed_at_close.setdefault(epoch, self._executed(epoch))

    @invariant()
    def steps_run_in_order_and_never_after_their_epoch(self) -> None:
        seen: dict[int, int] = {}
        newest = 0
        for epoch, step_id in self.runner.executed:
            assert epoch >= newest
            newest = epoch
            assert step_id == seen.get(epoch, 0) + 1
            seen[epoch] = step_id
        for epoch, count in self.executed_at_close.items():
            assert self._executed(epoch) == count

    @invariant()
    def results_come_in_order_without_a_gap(self) -> None:
        for results in self.results.values():
            assert results == list(range(1, len(results) + 1))

    @invariant()
    def a_half_closed_stream_ends_when_all_is_answered(self) -> None:
        if self.half_closed and self.epoch not in self.executed_at_close:
            done = len(self.results[self.epoch]) == self.sent
            assert (self.epoch in self.ends) == done

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        for reader in self.readers:
            reader.cancel()
        self._spin()
        self.loop.close()


TestStreams = StreamMachine.TestCase
TestStreams.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
