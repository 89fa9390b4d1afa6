"""Eviction: what goes first, what it learns, and that it is LRU where nothing sets blocks apart."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.scheduler.eviction import Eviction
from services.scheduler.ids import BlockId

A, B, C = BlockId(0), BlockId(1), BlockId(2)


def taught(reused: int, once: int) -> Eviction:
    """Blocks of turn 1 were reused, those of turn 0 were not, so many times."""
    eviction = Eviction()
    for number in range(reused + once):
        block_id = BlockId(1000 + number)
        eviction.idle(block_id, int(number < reused), now=number)
        if number < reused:
            eviction.reused(block_id)
        else:
            eviction.evict(block_id)
    return eviction


def test_longest_idle_goes_first_when_nothing_was_learnt() -> None:
    eviction = Eviction()
    eviction.idle(A, turn=3, now=5)
    eviction.idle(B, turn=0, now=2)
    eviction.idle(C, turn=0, now=9)
    assert eviction.victim(now=10) == B
    eviction.evict(B)
    assert eviction.victim(now=10) == A


def test_what_was_asked_once_goes_before_an_older_chat_when_only_chats_come_back() -> None:
    eviction = taught(reused=50, once=50)
    assert eviction.chance(1) > 0.9
    assert eviction.chance(0) < 0.1
    eviction.idle(A, turn=1, now=100)
    eviction.idle(B, turn=0, now=150)
    assert eviction.victim(now=200) == B
    # But not for ever: fifty times as likely is worth fifty times as long.
    eviction.reused(B)
    eviction.idle(B, turn=0, now=9990)
    assert eviction.victim(now=10_000) == A


@pytest.mark.parametrize(("share", "victim"), [(0.25, B), (0.75, A)])
def test_block_that_is_filled_in_part_is_worth_its_part(share: float, victim: BlockId) -> None:
    eviction = Eviction()
    eviction.idle(A, turn=0, now=0)
    eviction.idle(B, turn=1, now=49, share=share)
    assert eviction.victim(now=99) == victim


def test_prefix_goes_after_what_was_built_on_it_when_later_turns_are_worth_less() -> None:
    eviction = Eviction()
    for number in range(100, 150):
        eviction.idle(BlockId(number), turn=2, now=0)
        eviction.evict(BlockId(number))
    eviction.idle(B, turn=0, now=0)  # of the first turn
    eviction.idle(A, turn=0, now=0)  # its prefix, and then the second turn's
    eviction.reused(A)
    eviction.idle(C, turn=2, now=0)
    eviction.idle(A, turn=2, now=0)
    assert eviction.victim(now=10) == B
    eviction.evict(B)
    assert eviction.victim(now=10) == C


def test_old_outcomes_fade() -> None:
    eviction = taught(reused=4096, once=0)
    for number in range(10_000, 14_096):
        eviction.idle(BlockId(number), turn=1, now=0)
        eviction.evict(BlockId(number))
    assert eviction.chance(1) < 0.4


class EvictionMachine(RuleBasedStateMachine):
    """Blocks come, are used again and go; one class is compared with a list in order of use."""

    @initialize(num_classes=st.sampled_from([1, 4]))
    def start(self, num_classes: int) -> None:
        self.eviction, self.num_classes = Eviction(num_classes), num_classes
        self.order: list[BlockId] = []
        self.held: set[BlockId] = set()
        self.now = 0

    @rule(number=st.integers(0, 9), turn=st.integers(0, 5), share=st.sampled_from([0.5, 1.0]))
    def becomes_idle(self, number: int, turn: int, share: float) -> None:
        block_id = BlockId(number)
        if block_id not in self.order:
            self.now += 1
            self.eviction.idle(block_id, turn, self.now, share)
            self.order.append(block_id)
            self.held.discard(block_id)

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def is_used_again(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(self.order))
        self.eviction.reused(block_id)
        self.order.remove(block_id)
        self.held.add(block_id)

    @precondition(lambda self: self.order or self.held)
    @rule(data=st.data())
    def is_dropped(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from([*self.order, *sorted(self.held)]))
        self.eviction.forget(block_id)
        self.held.discard(block_id)
        self.order = [one for one in self.order if one != block_id]

    @precondition(lambda self: self.order)
    @rule()
    def one_is_evicted(self) -> None:
        victim = self.eviction.victim(self.now)
        assert victim in self.order
        if self.num_classes == 1:
            assert victim == self.order[0]
        self.eviction.evict(victim)
        self.order.remove(victim)

    @invariant()
    def knows_who_is_idle(self) -> None:
        if hasattr(self, "eviction"):
            assert sorted(self.eviction) == sorted(self.order)
            for kind in range(self.num_classes):
                assert 0 < self.eviction.chance(kind) <= 1


EvictionMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestEviction = EvictionMachine.TestCase
