"""WaitingQueue: its bound, its order by class, tenant and arrival; everybody's turn comes."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.scheduler.queue import PRIORITIES, WaitingQueue
from services.scheduler.sequence import Sequence
from tests.randomised import machine_tests
from tests.unit.scheduler.scene import make_request

TENANTS = {"a": 1.0, "b": 1.0, "c": 2.5}


class WaitingQueueMachine(RuleBasedStateMachine):
    """Arrivals, service in order, preemption back into the queue, and clients that leave.

    The model keeps a counter per class and tenant, forgets none, and sorts everybody each time.
    """

    @initialize(max_tokens=st.integers(1, 60))
    def start(self, max_tokens: int) -> None:
        self.queue = WaitingQueue(max_tokens)
        self.waiting: dict[Sequence, int] = {}
        # Let in without asking: preempted, or first into an empty queue.
        self.exempt: set[Sequence] = set()
        self.running: list[Sequence] = []
        self.counters: dict[tuple[int, str], float] = {}
        self.last: dict[int, tuple[int, str] | None] = dict.fromkeys(PRIORITIES)
        self.num_arrived = 0

    @rule(
        num_tokens=st.integers(1, 12),
        priority=st.sampled_from(PRIORITIES),
        tenant=st.sampled_from(sorted(TENANTS)),
        n=st.integers(1, 3),
    )
    def arrive(self, num_tokens: int, priority: int, tenant: str, n: int) -> None:
        is_empty = not self.waiting
        if self.queue.excess(n * num_tokens, priority, tenant, TENANTS[tenant]):
            assert not is_empty
            return
        self.num_arrived += 1
        request = make_request(
            self.num_arrived, [2], priority=priority, n=n, tenant=tenant, weight=TENANTS[tenant]
        )
        for sequence in request.sequences:
            self.push(sequence, num_tokens)
            if is_empty:
                self.exempt.add(sequence)

    @precondition(lambda self: self.waiting)
    @rule(cost=st.integers(0, 20))
    def serve(self, cost: int) -> None:
        """As the planner does it: whoever's turn it is in the highest class that has one."""
        head = next(s for p in PRIORITIES for s in self.queue.turns(p))
        assert head is self.in_order(head.priority)[0]
        assert head.priority == max(s.priority for s in self.waiting)
        earlier = [
            s
            for s in self.waiting
            if (s.priority, key_of(s)[1]) != (head.priority, key_of(head)[1])
            and s.priority == head.priority
            and s.order < head.order
        ]
        assert self.queue.admit(head) is bool(earlier)
        self.forget(head)
        self.running.append(head)
        self.charge(head, cost)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), cost=st.integers(1, 20))
    def generate(self, data: st.DataObject, cost: int) -> None:
        self.charge(data.draw(st.sampled_from(self.running)), cost)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.close(self.running.pop(data.draw(st.integers(0, len(self.running) - 1))))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.waiting, key=lambda s: s.order)))
        self.queue.remove(sequence)
        self.forget(sequence)
        with pytest.raises(ValueError, match="does not wait here"):
            self.queue.remove(sequence)
        self.close(sequence)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(1, 12))
    def preempt(self, data: st.DataObject, num_tokens: int) -> None:
        sequence = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.push(sequence, num_tokens)
        self.exempt.add(sequence)

    def push(self, sequence: Sequence, num_tokens: int) -> None:
        key, priority = key_of(sequence), sequence.priority
        waiting = {key_of(s) for s in self.waiting if s.priority == priority}
        if key not in waiting:
            last = self.last[priority]
            others = [self.counters[one] for one in waiting]
            level = min(others) if others else self.counters[last] if last else 0.0
            self.counters[key] = max(self.counters.get(key, 0.0), level)
        self.queue.push(sequence, num_tokens)
        self.waiting[sequence] = num_tokens

    def forget(self, sequence: Sequence) -> None:
        del self.waiting[sequence]
        self.exempt.discard(sequence)
        assert sequence.queued_tokens == 0
        if not any(s.priority == sequence.priority for s in self.waiting):
            self.last[sequence.priority] = key_of(sequence)

    def charge(self, sequence: Sequence, cost: int) -> None:
        assert sequence.account is not None
        sequence.account.charge(cost)
        self.counters[key_of(sequence)] += cost / TENANTS[sequence.request.tenant]

    def close(self, sequence: Sequence) -> None:
        self.queue.close(sequence)
        priority = sequence.priority
        if not any(s.priority == priority for s in (*self.waiting, *self.running)):
            self.last[priority] = None
            for key in [key for key in self.counters if key[0] == priority]:
                del self.counters[key]

    def in_order(self, priority: int) -> list[Sequence]:
        lines: dict[tuple[int, str], list[Sequence]] = {}
        for sequence in sorted(self.waiting, key=lambda s: s.order):
            if sequence.priority == priority:
                lines.setdefault(key_of(sequence), []).append(sequence)
        # nobody is charged while this is read: a tenant keeps its turn
        ordered = sorted(lines.items(), key=lambda item: (self.counters[item[0]], item[1][0].order))
        return [sequence for _, line in ordered for sequence in line]

    @invariant()
    def books_balance(self) -> None:
        queue = self.queue
        assert len(queue) == len(self.waiting)
        assert queue.num_tokens == sum(self.waiting.values())
        bounded = sum(n for sequence, n in self.waiting.items() if sequence not in self.exempt)
        assert bounded <= queue.max_tokens, "more was let in than the bound"
        assert all(sequence in queue for sequence in self.waiting)
        assert not any(sequence in queue for sequence in self.running)
        for sequence in (*self.waiting, *self.running):
            assert sequence.account is not None
            assert sequence.account.counter == pytest.approx(self.counters[key_of(sequence)])
        is_open = {key_of(s) for s in (*self.waiting, *self.running)}
        assert len(is_open) <= queue.num_accounts() <= len(self.counters)
        for tenant in TENANTS:
            mine = sum(n for s, n in self.waiting.items() if s.request.tenant == tenant)
            assert queue.num_tokens_of(tenant) == mine

    @invariant()
    def each_class_is_read_in_order(self) -> None:
        for priority in PRIORITIES:
            line, expected = list(self.queue.turns(priority)), self.in_order(priority)
            if line == expected:
                continue
            # ties of tenants are broken by their heads, as they change
            assert sorted(line, key=lambda s: s.order) == sorted(expected, key=lambda s: s.order)
            counters = [self.counters[key_of(s)] for s in line]
            assert counters == sorted(counters)

    def teardown(self) -> None:
        if not hasattr(self, "queue"):
            return
        for _ in range(len(self.waiting)):
            self.serve(1)
        for sequence in list(self.running):
            self.running.remove(sequence)
            self.close(sequence)
        assert len(self.queue) == 0, "somebody's turn never comes"
        assert self.queue.num_tokens == 0
        assert self.queue.num_accounts() == 0, "a tenant is remembered for nothing"


def key_of(sequence: Sequence) -> tuple[int, str]:
    return sequence.priority, sequence.request.tenant


TestWaitingQueue, TestWaitingQueueAtLength = machine_tests(
    WaitingQueueMachine, 25, 100, num_steps=40
)


def test_queue_refuses_to_remove_a_sequence_of_the_same_place_in_line() -> None:
    queue = WaitingQueue(10)
    queue.push(make_request(1, [2]).sequences[0], 1)
    twin = make_request(1, [2]).sequences[0]
    assert twin not in queue
    with pytest.raises(ValueError, match="does not wait here"):
        queue.remove(twin)
    assert len(queue) == 1
