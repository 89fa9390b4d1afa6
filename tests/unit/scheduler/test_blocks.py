"""BlockPool against a model that counts holders one by one."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.scheduler.blocks import BlockPool
from services.scheduler.ids import BlockId, StepId
from tests.randomised import machine_tests


@dataclass(eq=False)  # two may hold the same
class Holder:
    """Blocks held together, and the last step that touches them."""

    block_ids: list[BlockId]
    last_step: int = 0


class BlockPoolMachine(RuleBasedStateMachine):
    """Holders come and go while steps that touch their blocks are in flight."""

    @initialize(num_blocks=st.integers(1, 8))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.evicted: list[BlockId] = []
        self.pool.on_evict(self.evicted.append)
        self.holders: list[Holder] = []
        # Released, but touched by a step in flight.
        self.leaving: list[Holder] = []
        self.steps: deque[tuple[int, set[BlockId]]] = deque()
        self.num_planned = 0
        self.kept: set[BlockId] = set()
        self.cached: list[BlockId] = []  # oldest first

    def refs(self) -> Counter[BlockId]:
        return Counter(b for holder in self.holders + self.leaving for b in holder.block_ids)

    @rule(count=st.integers(1, 4))
    def allocate(self, count: int) -> None:
        held, num_free = self.refs(), self.pool.num_free
        if count > num_free + len(self.cached):
            with pytest.raises(ValueError, match="available"):
                self.pool.allocate(count)
            return
        self.evicted.clear()
        taken = self.pool.allocate(count)
        assert len(set(taken)) == count
        assert not set(taken) & set(held), "a block has two writers"
        assert not any(set(taken) & touched for _, touched in self.steps), "reused in flight"
        num_evicted = max(0, count - num_free)
        assert self.evicted == self.cached[:num_evicted], "not the oldest was evicted"
        del self.cached[:num_evicted]
        self.kept.difference_update(self.evicted)
        self.holders.append(Holder(taken))

    @precondition(lambda self: self.holders or self.cached)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        alive = sorted({b for holder in self.holders for b in holder.block_ids} | set(self.cached))
        chosen = data.draw(st.lists(st.sampled_from(alive), min_size=1, unique=True))
        self.pool.hold(chosen)
        self.cached = [b for b in self.cached if b not in chosen]
        self.holders.append(Holder(chosen))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(data.draw(st.sampled_from(self.holders)).block_ids))
        self.pool.keep(block_id)
        self.kept.add(block_id)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.kept)))
        self.pool.drop(block_id)
        self.kept.discard(block_id)
        self.cached = [b for b in self.cached if b != block_id]

    @precondition(lambda self: self.holders and len(self.steps) < 3)
    @rule(data=st.data())
    def send_step(self, data: st.DataObject) -> None:
        self.num_planned += 1
        touched: set[BlockId] = set()
        for index in data.draw(st.sets(st.integers(0, len(self.holders) - 1), min_size=1)):
            self.holders[index].last_step = self.num_planned
            touched.update(self.holders[index].block_ids)
        self.steps.append((self.num_planned, touched))

    @precondition(lambda self: self.steps)
    @rule()
    def step_runs(self) -> None:
        step_id, _ = self.steps.popleft()
        self.pool.step_executed(StepId(step_id))
        over = [holder for holder in self.leaving if holder.last_step <= step_id]
        for holder in over:
            self.leaving.remove(holder)
            self.give_back(holder)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        refs = self.refs()
        exclusive = sum(refs[b] == 1 for b in holder.block_ids)
        assert self.pool.num_exclusive(holder.block_ids) == exclusive
        self.holders.remove(holder)
        self.pool.release(holder.block_ids, StepId(holder.last_step))
        if any(step_id <= holder.last_step for step_id, _ in self.steps):
            self.leaving.append(holder)
        else:
            self.give_back(holder)

    @rule()
    def epoch_breaks(self) -> None:
        while self.holders:
            self.leaving.append(self.holders.pop(0))
            holder = self.leaving[-1]
            if not any(step_id <= holder.last_step for step_id, _ in self.steps):
                self.give_back(self.leaving.pop())
            self.pool.release(holder.block_ids, StepId(holder.last_step))
        self.pool.restart_steps()
        self.steps.clear()
        self.num_planned = 0
        while self.leaving:
            self.give_back(self.leaving.pop(0))

    def give_back(self, holder: Holder) -> None:
        held = self.refs()
        for block_id in reversed(holder.block_ids):
            if not held[block_id] and block_id in self.kept:
                self.cached.append(block_id)

    @invariant()
    def books_balance(self) -> None:
        pool, used = self.pool, len(self.refs())
        assert pool.num_used == used
        assert pool.num_cached == len(self.cached)
        assert pool.num_free == pool.num_blocks - used - len(self.cached)
        assert pool.num_available == pool.num_free + pool.num_cached
        assert pool.has_quarantine == bool(self.leaving)
        assert {b for b in range(pool.num_blocks) if pool.is_cached(BlockId(b))} == set(self.cached)
        pool.check_integrity(b for holder in self.holders for b in holder.block_ids)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.epoch_breaks()
            assert self.pool.num_used == 0, "a block is held by nobody"


TestBlockPool, TestBlockPoolAtLength = machine_tests(BlockPoolMachine, 20, 60, num_steps=40)


def test_block_comes_back_when_its_last_step_has_run() -> None:
    pool = BlockPool(1)
    pool.release(pool.allocate(1), after=StepId(2))
    pool.step_executed(StepId(1))
    assert (pool.num_available, pool.has_quarantine) == (0, True)
    pool.step_executed(StepId(2))
    assert (pool.num_available, pool.has_quarantine) == (1, False)


def test_prefix_outlives_what_was_built_on_it_when_blocks_are_evicted() -> None:
    pool = BlockPool(3)
    chain = pool.allocate(3)
    for block_id in chain:
        pool.keep(block_id)
    pool.release(chain, after=StepId(0))
    assert pool.allocate(2) == [chain[2], chain[1]]
    assert pool.is_cached(chain[0])


def test_nothing_is_taken_when_more_is_wanted_than_there_is() -> None:
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="3 blocks wanted, 2 available"):
        pool.allocate(3)
    assert pool.num_free == 2
