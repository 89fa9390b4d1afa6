"""Ledger and window under plans that nobody would make: the books must stand up to any of them.

The planner is replaced by one that draws; the model shard checks that each block that is read
holds what its reader thinks, has one writer, and is not reused by a step while another in flight
touches it.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from infermesh.errors import NumericalError, OutOfMemory
from services.scheduler.ids import BlockId
from services.scheduler.plan import (
    Admission,
    Limits,
    PlannedRow,
    PlanState,
    StepPlan,
    find_start,
)
from services.scheduler.queue import PRIORITIES
from services.scheduler.sequence import Sequence
from tests.model_shard import ModelShard
from tests.randomised import machine_tests
from tests.unit.scheduler.scene import Scene
from tests.unit.scheduler.world import World

_ACTIONS = st.sampled_from(["run", "run", "run", "rest", "preempt"])


class DrawnPlan:
    """A plan that keeps to the limits and is otherwise arbitrary."""

    def __init__(self, data: st.DataObject, state: PlanState, limits: Limits) -> None:
        self.data, self.state, self.size = data, state, limits.block_size
        self.budget, self.available = limits.max_batch_tokens, state.pool.num_available
        self.plan = StepPlan([], [], [], [], [])
        self.claimed: set[BlockId] = set()
        for sequence in state.running:
            self.draw_row(sequence)
        for priority in PRIORITIES:
            for sequence in state.waiting.turns(priority):
                self.draw_admission(sequence)

    def draw_row(self, sequence) -> None:
        place = sequence.placement
        action = self.data.draw(_ACTIONS)
        if action == "preempt":
            self.plan.preempted.append(sequence)
        elif action == "run" and self.budget and place.end < sequence.max_len:
            count = self.draw_count(place.end - place.num_planned)
            end = place.num_planned + count
            num_new = max(0, -(-end // self.size) - len(place.block_ids))
            if num_new <= self.available:
                self.take(count, num_new)
                self.plan.rows.append(PlannedRow(sequence, count, num_new))

    def draw_admission(self, sequence) -> None:
        is_full = len(self.plan.admissions) == self.state.num_free_slots or not self.budget
        if is_full or sequence.num_in_flight or not self.data.draw(st.booleans()):
            return
        start, _ = find_start(sequence, self.state.cache, self.size, self.claimed)
        idle = {b for b in start.touched if self.state.pool.is_cached(b)} - self.claimed
        count = self.draw_count(len(sequence.token_ids) - start.num_computed)
        num_new = -(-(start.num_computed + count) // self.size) - len(start.held)
        if num_new + len(idle) <= self.available:
            self.claimed |= idle
            self.take(count, num_new + len(idle))
            self.plan.admissions.append(Admission(sequence, start, count, num_new))

    def draw_count(self, most: int) -> int:
        return self.data.draw(st.integers(1, min(most, self.budget)))

    def take(self, num_tokens: int, num_blocks: int) -> None:
        self.budget -= num_tokens
        self.available -= num_blocks


class LedgerMachine(RuleBasedStateMachine):
    """Requests, drawn steps, results, failed rows, cancels and breaks, in any order."""

    @initialize(
        num_blocks=st.integers(3, 12),
        block_size=st.integers(1, 3),
        window=st.integers(1, 3),
        caching=st.sampled_from([True, True, False]),
    )
    def start(self, num_blocks: int, block_size: int, window: int, caching: bool) -> None:
        self.shard = ModelShard(
            num_blocks=num_blocks, block_size=block_size, max_num_seqs=4, window=window
        )
        self.world = World(
            self.shard, enable_prefix_caching=caching, max_crashes_per_request=10_000
        )

    @rule(
        prompt=st.lists(st.integers(2, 3), min_size=1, max_size=8),
        n=st.sampled_from([1, 1, 2, 3]),
        domain=st.sampled_from(["a", "a", "b"]),
    )
    def submit(self, prompt: list[int], n: int, domain: str) -> None:
        if len(prompt) < self.shard.num_blocks * self.shard.block_size:
            choices = [(index, []) for index in range(n)]
            self.world.submit(prompt, choices=choices, temperature=1.0, max_tokens=5, domain=domain)

    @precondition(lambda self: self.world.recorder.outputs)
    @rule(data=st.data(), words=st.lists(st.integers(2, 3), max_size=3))
    def go_on(self, data: st.DataObject, words: list[int]) -> None:
        """Somebody asks again with a part of what was said, or all of it, and more."""
        key = data.draw(st.sampled_from(sorted(self.world.recorder.outputs)))
        before = self.world.submissions[key[0]]
        said = before.prompt_token_ids + self.world.recorder.outputs[key]
        kept = data.draw(st.integers(1, len(said)))
        prompt = said[: min(kept, 20)] + words
        if len(prompt) < self.shard.num_blocks * self.shard.block_size:
            domain = before.sharing_domain
            self.world.submit(prompt, temperature=1.0, max_tokens=5, domain=domain)

    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        def drawn(state: PlanState, limits: Limits) -> StepPlan:
            return DrawnPlan(data, state, limits).plan

        with patch("services.scheduler.batcher.plan", drawn):
            self.world.send()

    @precondition(lambda self: self.shard.queue)
    @rule()
    def answer(self) -> None:
        self.world.answer()

    @rule(slot=st.integers(0, 3))
    def next_row_fails(self, slot: int) -> None:
        self.shard.failing_slots = {slot}

    @precondition(lambda self: self.world.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        stream_id = data.draw(st.integers(1, len(self.world.requests)))
        self.world.batcher.cancel(self.world.requests[stream_id])

    @rule(crash=st.booleans(), executed_unseen=st.integers(0, 2))
    def stream_breaks(self, crash: bool, executed_unseen: int) -> None:
        self.world.break_stream(crash, executed_unseen)

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "world"):
            self.world.batcher.roster.check_integrity()
            pool = self.world.batcher.roster.ledger.pool
            assert pool.num_free + pool.num_used + pool.num_cached == self.shard.num_blocks
            assert len(self.world.batcher.in_flight) <= self.shard.window

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.shard.failing_slots.clear()
            self.world.run()
            self.world.check_outputs(allowed=(OutOfMemory, NumericalError))


TestLedger, TestLedgerAtLength = machine_tests(LedgerMachine, 20, 60, num_steps=40)


def test_block_that_a_cancelled_one_read_is_not_reused_while_its_step_is_in_flight() -> None:
    scene = Scene(num_blocks=2, caching=False)
    sequence = scene.run(4, in_flight=True)
    (held,) = sequence.placement.block_ids
    scene.finish(sequence)
    assert scene.ledger.pool.num_available == 1
    assert held not in scene.ledger.pool.allocate(1)
    scene.execute()
    assert scene.ledger.pool.allocate(1) == [held]


def test_ended_slots_are_told_with_the_next_step_that_is_sent() -> None:
    scene = Scene()
    slot = scene.run(4).placement.slot
    scene.finish(scene.ledger.running[0])
    assert scene.apply(scene.plan()).ended_slots == []  # nothing was sent
    scene.wait(4)
    step = scene.apply(scene.plan())
    assert step.ended_slots == [slot]
    assert step.placed[0].slot == slot


def test_lost_are_returned_in_order_of_admission_when_the_steps_break() -> None:
    scene = Scene()
    sequences = [scene.run(5), scene.run([6] * 5, in_flight=True)]
    cached = scene.ledger.pool.num_cached
    assert scene.ledger.break_steps() == sequences
    scene.ledger.check_idle()
    # What had run stays, a block and a tail; what was in flight was never computed.
    assert scene.ledger.pool.num_cached == cached + 2
    assert len(scene.ledger.cache) == 1


@pytest.mark.parametrize("size", [1, 4])
def test_fork_copies_a_partial_block_and_shares_whole_ones(size: int) -> None:
    scene = Scene(block_size=size)
    leader = scene.run(7, n=2)
    step = scene.admit(leader.request.sequences[1])
    mine, theirs = step.placed[0].block_ids, leader.placement.block_ids
    full = 6 // size
    assert mine[:full] == theirs[:full]
    assert [(copy.source, copy.destination) for copy in step.copies] == (
        [] if size == 1 else [(theirs[full], mine[full])]
    )
    assert mine[full] != theirs[full]


def test_tail_is_findable_when_a_sequence_left_and_grows_with_what_was_in_flight() -> None:
    scene = Scene()
    sequence = scene.run([5] * 5)
    scene.decode(sequence)
    scene.finish(sequence)
    assert found_behind(scene, sequence, [5, 99]) == 1
    scene.execute()  # the token sampled last is computed now
    assert found_behind(scene, sequence, [5, 99]) == 2
    assert (scene.ledger.pool.num_cached, len(scene.ledger.cache)) == (2, 1)


def test_copy_that_was_never_made_is_not_findable_when_its_sequence_left() -> None:
    scene = Scene()
    first = scene.run([5] * 7)
    scene.finish(first)
    reader = scene.arrive([*[5] * 6, 7, 7]).sequences[0]
    (copy,) = scene.admit(reader).copies
    scene.ledger.break_steps()
    assert not scene.ledger.pool.is_cached(copy.destination)
    assert scene.ledger.pool.is_cached(copy.source)
    assert found_behind(scene, first, [5, 5, 5]) == 3


def test_fork_that_left_before_its_copy_was_made_leaves_nothing() -> None:
    scene = Scene()
    leader = scene.run(7, n=2)
    fork = leader.request.sequences[1]
    scene.admit(fork)
    scene.finish(fork)
    assert found_behind(scene, leader, leader.token_ids[4:7]) == 0
    scene.execute()
    assert found_behind(scene, leader, leader.token_ids[4:7]) == 3


def test_tail_stays_findable_when_who_went_on_in_it_never_ran() -> None:
    scene = Scene()
    first = scene.run([5] * 6)
    (_, tail) = first.placement.block_ids
    scene.finish(first)
    reader = scene.arrive([*[5] * 6, 7]).sequences[0]
    assert scene.admit(reader).placed[0].block_ids[1] == tail
    scene.ledger.break_steps()
    assert scene.ledger.pool.is_cached(tail)
    assert found_behind(scene, first, [5, 5, 7]) == 2


def test_one_of_two_equal_tails_is_kept_and_none_beside_what_goes_on_from_it() -> None:
    scene = Scene()
    two = [scene.run([5] * 6), scene.run([5] * 6)]
    for sequence in two:
        scene.finish(sequence)
    assert scene.ledger.pool.num_cached == 2
    longer = scene.arrive([5] * 7).sequences[0]
    longer_tail = scene.admit(longer).placed[0].block_ids[1]
    scene.execute()
    other = scene.run([5] * 9)  # fills a copy of that block
    scene.finish(longer)
    assert not scene.ledger.pool.is_cached(longer_tail)
    scene.finish(other)
    assert scene.ledger.pool.num_cached == len(scene.ledger.cache) + 1 == 3


def test_turn_counts_the_answers_that_a_prompt_goes_on_from() -> None:
    scene = Scene(num_blocks=32)
    prompt = [5] * 6
    for turn in range(3):
        sequence = scene.run(prompt)
        assert sequence.turn == turn
        for _ in range(3):
            scene.decode_more(sequence)
        scene.finish(sequence)
        prompt = [*sequence.token_ids, 6, 6]
    alike = [scene.run([5] * 6), scene.run([*[5] * 6, 7, 7, 7])]
    assert [sequence.turn for sequence in alike] == [0, 0]  # they share no answer


def test_chat_outlives_what_was_asked_once_when_chats_were_seen_to_come_back() -> None:
    scene = Scene(num_blocks=12)
    for number in range(30):  # they come back once each, and what is asked once never does
        prompt = [100 + number] * 6
        for _ in range(3):
            sequence = scene.run(prompt)
            scene.decode_more(sequence)
            scene.finish(sequence)
            prompt = [*sequence.token_ids, 6]
        scene.finish(scene.run(8))
    chat = [*prompt, 6]
    for _ in range(4):
        scene.finish(scene.run(8))
    start, _ = find_start(scene.arrive(chat).sequences[0], scene.ledger.cache, 4)
    assert start.num_computed >= 8


def found_behind(scene: Scene, sequence: Sequence, token_ids: list[int]) -> int:
    """How many of these tokens a block has behind the first one of a sequence."""
    part = scene.ledger.cache.find_part(sequence.block_hashes[0], token_ids)
    return part.num_tokens if part else 0
