"""The books of one device: who runs in which slot on which blocks, and what those blocks hold.

Applies plans and results to slots, `BlockPool` and `PrefixCache`. Decides nothing, sends nothing.

    block of the pool:  free ─► used by placements ─► cached under a hash ─► used again, or evicted
    published hash:     at planning (unconfirmed) ─► step ran (confirmed) | step failed (withdrawn)
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from services.scheduler.blocks import BlockPool
from services.scheduler.ids import BlockId, SlotId, StepId
from services.scheduler.prefix_cache import PrefixCache, extend_hashes, long_scope
from services.scheduler.sequence import Placement, Sequence
from services.scheduler.step_plan import Admission, PlannedRow, StepPlan


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a device has room for."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_batch_tokens: int


class AppliedRow(NamedTuple):
    """Positions `first` to `end - 1` of a placement, as part of a step."""

    placement: Placement
    first: int
    end: int
    new_block_ids: list[BlockId]
    # Its input is the token that the slot sampled last.
    from_last: bool
    samples: bool


class BlockMove(NamedTuple):
    """Contents of one block to be copied into another."""

    source: BlockId
    destination: BlockId


@dataclass(frozen=True, slots=True)
class AppliedStep:
    """A step as it goes to the device, and as it is remembered until its result is there."""

    step_id: StepId
    ended_slots: list[SlotId]
    copies: list[BlockMove]
    placed: list[Placement]
    rows: list[AppliedRow]
    num_tokens: int
    planned_s: float

    @property
    def num_known(self) -> int:
        """Its tokens of prompts and of outputs computed again: all but the decodes."""
        return self.num_tokens - sum(row.from_last for row in self.rows)


class Ledger:
    """All that is held on one device."""

    def __init__(self, capacity: Capacity, caching: bool, rope_switch_len: int = 0) -> None:
        self.capacity = capacity
        self.rope_switch_len = rope_switch_len
        self.pool = BlockPool(capacity.num_blocks)
        self.cache = PrefixCache(self.pool, caching)
        self.running: list[Sequence] = []
        self._caching = caching
        self._free_slots: list[SlotId] = []
        self._ended_slots: list[SlotId] = []
        self._unconfirmed: dict[BlockId, tuple[Placement, StepId]] = {}
        self._num_turns = 0
        self._reset_slots()

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def hash_blocks(self, sequence: Sequence) -> None:
        """Brings the hashes of its full blocks up to what it knows, and to how long it is."""
        if sequence.placement is None and not sequence.is_long:
            sequence.is_long = 0 < self.rope_switch_len < len(sequence.token_ids)
            if sequence.is_long:
                sequence.block_hashes.clear()
        if self._caching:
            scope = sequence.request.scope
            extend_hashes(
                sequence.block_hashes,
                long_scope(scope) if sequence.is_long else scope,
                sequence.token_ids,
                self.capacity.block_size,
            )

    def apply(self, plan: StepPlan, step_id: StepId, now_s: float) -> AppliedStep:
        """Carries out a plan; the preempted have lost their places after it."""
        for admission in plan.admissions:  # before anything can be evicted
            self.pool.hold(admission.start.shared)
            if admission.start.copy_from is not None:
                self.pool.hold([admission.start.copy_from])
        for sequence in plan.preempted:
            assert sequence.placement is not None
            self.retire(sequence.placement)
        rows = [self._grow(row, step_id) for row in plan.rows]
        copies: list[BlockMove] = []
        first_admitted = len(rows)
        rows.extend(self._place(admission, step_id, copies) for admission in plan.admissions)
        # Last, so that nobody reads in this step what this step fills.
        for row in rows:
            self._offer(row.placement, min(row.end, len(row.placement.sequence.token_ids)), step_id)
        placed = [row.placement for row in rows[first_admitted:]]
        ended: list[SlotId] = []
        if rows:  # else nothing is sent that could carry them
            ended, self._ended_slots = self._ended_slots, []
        num_tokens = sum(row.end - row.first for row in rows)
        return AppliedStep(step_id, ended, copies, placed, rows, num_tokens, now_s)

    def executed(self, placement: Placement, end: int, step_id: StepId) -> None:
        """The KV of positions below `end` is there, and every token of them is known."""
        placement.num_computed = end
        unconfirmed = placement.unconfirmed
        while unconfirmed and unconfirmed[0][0] <= step_id:
            del self._unconfirmed[unconfirmed.popleft()[1]]
        if placement.relies_on:
            placement.relies_on = [link for link in placement.relies_on if link[1] > step_id]
        if not placement.sequence.is_over:
            self._offer(placement, end, None)

    def retire(self, placement: Placement) -> None:
        """Ends a stay; blocks come back when the last step that touches them has run."""
        sequence = placement.sequence
        self.cache.stop_filling(sequence.block_hashes[placement.num_offered :])
        self.pool.release(placement.block_ids, placement.last_step)
        self._free_slots.append(placement.slot)
        self._ended_slots.append(placement.slot)
        self.running.remove(sequence)
        sequence.placement = None

    def void(
        self, placement: Placement, step_id: StepId, in_flight: Seq[Placement]
    ) -> list[Sequence]:
        """`placement` failed in step `step_id`: whoever relied on it there must start again.

        `in_flight` are the placements with rows in later steps; a reader of what step `step_id`
        was to fill is one of them. Returns those that were running: their places are given up.
        """
        placement.is_void = True
        self._withdraw(placement)
        lost: list[Sequence] = []
        for place in in_flight:
            if place.is_void:
                continue
            if any(on is placement and until >= step_id for on, until in place.relies_on):
                if place.sequence.placement is place:
                    self.retire(place)
                    lost.append(place.sequence)
                lost.extend(self.void(place, step_id, in_flight))
        return lost

    def break_steps(self) -> list[Sequence]:
        """The steps in flight will never be answered: all places are lost, in order of admission.

        What executed steps filled stays in the cache.
        """
        for placement, _ in list(self._unconfirmed.values()):
            self._withdraw(placement)
        lost = list(self.running)
        for sequence in lost:
            assert sequence.placement is not None
            self.retire(sequence.placement)
        self.pool.restart_steps()
        self.cache.filling.clear()
        self._reset_slots()
        return lost

    def check_idle(self) -> None:
        """Raises AssertionError where something is still held though nobody is there; O(1)."""
        assert self.pool.num_used == 0, f"{self.pool.num_used} blocks leaked"
        assert self.num_free_slots == self.capacity.max_num_seqs, "a slot leaked"
        left = len(self.running) + len(self.cache.filling) + len(self._unconfirmed)
        assert left == 0, "work is left over"

    def check_integrity(self) -> None:
        """Raises AssertionError where something is held that nobody holds, or the reverse."""
        self.pool.check_integrity(self._held())
        self.cache.check_integrity()
        slots = [s.placement.slot for s in self.running if s.placement is not None]
        assert len(slots) == len(self.running), "a running sequence has no place"
        assert sorted(slots + self._free_slots) == list(range(self.capacity.max_num_seqs))
        if not self.running:
            assert not self.cache.filling, "blocks are awaited that nobody computes"

    def _held(self) -> Iterator[BlockId]:
        for sequence in self.running:
            if sequence.placement is not None:
                yield from sequence.placement.block_ids

    def _grow(self, planned: PlannedRow, step_id: StepId) -> AppliedRow:
        sequence, count, num_new = planned
        place = sequence.placement
        assert place is not None
        new_blocks: list[BlockId] = self.pool.allocate(num_new) if num_new else []
        place.block_ids += new_blocks
        return self._advance(place, count, new_blocks, step_id)

    def _place(self, admission: Admission, step_id: StepId, copies: list[BlockMove]) -> AppliedRow:
        sequence, start, count, num_new = admission
        new_blocks = self.pool.allocate(num_new)
        if start.copy_from is not None:
            copies.append(BlockMove(start.copy_from, new_blocks[0]))
            self.pool.release([start.copy_from], step_id)
        place = Placement(
            sequence=sequence,
            slot=self._free_slots.pop(),
            block_ids=start.shared + new_blocks,
            num_planned=start.num_computed,
            num_computed=start.num_computed,
            num_offered=len(start.shared),
        )
        place.relies_on = [
            self._unconfirmed[block] for block in start.shared if block in self._unconfirmed
        ]
        leader = start.leader
        if leader is not None and leader.num_computed <= start.num_computed:
            place.relies_on.append((leader, leader.last_step))
        self.cache.start_filling(sequence.block_hashes[len(start.shared) :])
        sequence.placement = place
        sequence.waits_for = None
        self.running.append(sequence)
        return self._advance(place, count, [], step_id)

    def _advance(
        self, place: Placement, count: int, new_blocks: list[BlockId], step_id: StepId
    ) -> AppliedRow:
        sequence = place.sequence
        first, end = place.num_planned, place.num_planned + count
        samples = end == place.end
        row = AppliedRow(place, first, end, new_blocks, place.has_sampled, samples)
        place.num_planned = end
        place.last_step = step_id
        self._num_turns += 1
        place.last_turn = self._num_turns
        if samples:
            place.num_sampling += 1
            place.has_sampled = True
        sequence.num_in_flight += 1
        return row

    def _offer(self, place: Placement, end: int, step_id: StepId | None) -> None:
        """Publishes the full blocks below `end`; with a step id, unconfirmed until it has run."""
        block_size = self.capacity.block_size
        if not self._caching or end // block_size <= place.num_offered:
            return
        self.hash_blocks(place.sequence)
        for index in range(place.num_offered, end // block_size):
            block_id = place.block_ids[index]
            if not self.cache.publish(place.sequence.block_hashes[index], block_id):
                continue
            if step_id is not None:
                place.unconfirmed.append((step_id, block_id))
                self._unconfirmed[block_id] = (place, step_id)
        place.num_offered = end // block_size

    def _withdraw(self, placement: Placement) -> None:
        for _, block_id in placement.unconfirmed:
            del self._unconfirmed[block_id]
            self.cache.withdraw(block_id)
        placement.unconfirmed.clear()

    def _reset_slots(self) -> None:
        self._free_slots = [SlotId(i) for i in reversed(range(self.capacity.max_num_seqs))]
        self._ended_slots = []
