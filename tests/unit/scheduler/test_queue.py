"""WaitingQueue: its bound, its order, and that everybody's turn comes; the drain rate."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.scheduler.queue import PRIORITIES, Throughput, WaitingQueue
from services.scheduler.sequence import Sequence
from tests.unit.scheduler.scene import make_request

priorities = st.sampled_from(PRIORITIES)


class WaitingQueueMachine(RuleBasedStateMachine):
    """Arrivals, service in order, preemption back into the queue, and clients that leave."""

    @initialize(max_tokens=st.integers(1, 30))
    def start(self, max_tokens: int) -> None:
        self.queue = WaitingQueue(max_tokens)
        self.waiting: dict[Sequence, int] = {}
        # Let in without asking: preempted, or first into an empty queue.
        self.exempt: set[Sequence] = set()
        self.served: list[Sequence] = []
        self.num_arrived = 0

    @rule(num_tokens=st.integers(1, 12), priority=priorities, n=st.integers(1, 3))
    def arrive(self, num_tokens: int, priority: int, n: int) -> None:
        total, is_empty = sum(self.waiting.values()), not self.waiting
        has_room = is_empty or total + n * num_tokens <= self.queue.max_tokens
        assert self.queue.has_room(n * num_tokens) is has_room
        if not has_room:
            return
        self.num_arrived += 1
        request = make_request(self.num_arrived, [2], priority=priority, n=n)
        for sequence in request.sequences:
            self.queue.push(sequence, num_tokens)
            self.waiting[sequence] = num_tokens
            if is_empty:
                self.exempt.add(sequence)

    @precondition(lambda self: self.waiting)
    @rule()
    def serve(self) -> None:
        """As the planner does it: the head of the highest class that has one."""
        head = next(line[0] for p in PRIORITIES if (line := self.queue.in_class(p)))
        assert head is min(self.waiting, key=lambda s: (-s.priority, s.order))
        self.take(head)
        self.served.append(head)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.take(data.draw(st.sampled_from(sorted(self.waiting, key=lambda s: s.order))))

    @precondition(lambda self: self.served)
    @rule(data=st.data(), num_tokens=st.integers(1, 12))
    def preempt(self, data: st.DataObject, num_tokens: int) -> None:
        sequence = self.served.pop(data.draw(st.integers(0, len(self.served) - 1)))
        self.queue.push(sequence, num_tokens)
        self.waiting[sequence] = num_tokens
        self.exempt.add(sequence)

    def take(self, sequence: Sequence) -> None:
        self.queue.remove(sequence)
        del self.waiting[sequence]
        self.exempt.discard(sequence)
        assert sequence.queued_tokens == 0
        with pytest.raises(ValueError, match="does not wait here"):
            self.queue.remove(sequence)

    @invariant()
    def books_balance(self) -> None:
        queue = self.queue
        assert len(queue) == len(self.waiting)
        assert queue.num_tokens == sum(self.waiting.values())
        bounded = sum(n for sequence, n in self.waiting.items() if sequence not in self.exempt)
        assert bounded <= queue.max_tokens, "more was let in than the bound"
        for priority in PRIORITIES:
            line = list(queue.in_class(priority))
            expected = [s for s in self.waiting if s.priority == priority]
            assert line == sorted(expected, key=lambda s: s.order), "somebody was overtaken"
        assert all(sequence in queue for sequence in self.waiting)
        assert not any(sequence in queue for sequence in self.served)

    def teardown(self) -> None:
        if not hasattr(self, "queue"):
            return
        for _ in range(len(self.waiting)):
            self.serve()
        assert len(self.queue) == 0, "somebody's turn never comes"
        assert self.queue.num_tokens == 0


WaitingQueueMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestWaitingQueue = WaitingQueueMachine.TestCase


def test_empty_queue_takes_what_is_longer_than_its_bound() -> None:
    queue = WaitingQueue(4)
    assert queue.has_room(100)
    queue.push(make_request(1, [2]).sequences[0], 100)
    assert not queue.has_room(1)


def test_queue_refuses_to_remove_a_sequence_of_the_same_place_in_line() -> None:
    queue = WaitingQueue(10)
    queue.push(make_request(1, [2]).sequences[0], 1)
    twin = make_request(1, [2]).sequences[0]
    assert twin not in queue
    with pytest.raises(ValueError, match="does not wait here"):
        queue.remove(twin)
    assert len(queue) == 1


def test_drain_rate_counts_the_time_that_the_device_was_busy() -> None:
    throughput = Throughput()
    assert throughput.drain_rate() is None
    throughput.record(sent_s=0.0, done_s=1.0, num_tokens=100)
    throughput.record(sent_s=0.5, done_s=2.0, num_tokens=100)  # overlaps the first: 1 s busy
    throughput.record(sent_s=6.0, done_s=8.0, num_tokens=200)  # after 4 s of idling
    assert throughput.drain_rate() == pytest.approx(400 / 4)
    assert throughput.seconds_for(250) == pytest.approx(2.5)
    assert throughput.tokens_per_second(now_s=8.0) == pytest.approx(400 / 8)


def test_drain_rate_forgets_old_steps_but_never_the_last_one() -> None:
    throughput = Throughput(horizon_s=10.0)
    throughput.record(sent_s=0.0, done_s=1.0, num_tokens=1000)
    throughput.record(sent_s=20.0, done_s=21.0, num_tokens=10)
    assert throughput.drain_rate() == pytest.approx(10)
    throughput.tokens_per_second(now_s=500.0)
    assert throughput.drain_rate() == pytest.approx(10)


@pytest.mark.parametrize(
    ("excess_tokens", "wait_s"),
    [(100, 1.0), (250, 2.5), (1, 0.1), (1_000_000, 60.0)],
    ids=["one second", "longer", "at least", "at most"],
)
def test_retry_time_follows_from_the_drain_rate(excess_tokens: int, wait_s: float) -> None:
    throughput = Throughput()
    assert throughput.retry_after_s(excess_tokens) == 1.0  # nothing is known yet
    throughput.record(sent_s=0.0, done_s=2.0, num_tokens=200)
    assert throughput.retry_after_s(excess_tokens) == pytest.approx(wait_s)
