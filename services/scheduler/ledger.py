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

from infermesh.block_hash import extend_hashes
from services.scheduler.blocks import BlockPool
from services.scheduler.eviction import NUM_CLASSES, Eviction
from services.scheduler.ids import BlockId, SlotId, StepId
from services.scheduler.prefix_cache import PrefixCache
from services.scheduler.sequence import Placement, Sequence
from services.scheduler.step_plan import Admission, Shortage, StepPlan


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
    new_block_ids: Seq[BlockId]
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
    # The first of its rows are decodes without a new block: their slots say all of them.
    num_decodes: int
    num_tokens: int
    # Of those, tokens of prompts and of outputs computed again: all but the decodes.
    num_known: int
    planned_s: float
    # Kept blocks that were given up for it.
    num_evicted: int
    # Query tokens that it could have held.
    budget: int
    # Of the device, where a target was to be kept.
    expected_s: float | None
    # Why no more were admitted.
    shortage: Shortage | None


class Ledger:
    """All that is held on one device."""

    def __init__(
        self,
        capacity: Capacity,
        caching: bool,
        rope_switch_len: int = 0,
        eviction_classes: int = NUM_CLASSES,
    ) -> None:
        self.capacity = capacity
        self.rope_switch_len = rope_switch_len
        self.pool = BlockPool(capacity.num_blocks, Eviction(eviction_classes))
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
            extend_hashes(
                sequence.block_hashes,
                sequence.scope,
                sequence.token_ids,
                self.capacity.block_size,
            )

    def apply(self, plan: StepPlan, step_id: StepId, now_s: float) -> AppliedStep:
        """Carries out a plan; the preempted have lost their places after it."""
        num_evicted = self.pool.num_evicted
        for admission in plan.admissions:  # before anything can be evicted
            self.pool.hold(admission.start.touched)
        for sequence in plan.preempted:
            assert sequence.placement is not None
            self.retire(sequence.placement)
        rows: list[AppliedRow] = []
        for sequence, count, num_new in plan.rows:
            assert sequence.placement is not None
            rows.append(self._advance(sequence.placement, count, num_new, step_id))
        copies: list[BlockMove] = []
        first_admitted = len(rows)
        rows.extend(self._place(admission, step_id, copies) for admission in plan.admissions)
        num_decodes = _num_decodes(rows)
        num_known = num_from_last = 0
        for row in rows[num_decodes:]:
            if row.from_last:
                num_from_last += 1
            else:
                num_known += row.end - row.first
        # Last, so that nobody reads in this step what this step fills.
        block_size = self.capacity.block_size
        for place, _, end, _, _, _ in rows:
            if end // block_size > place.num_offered:
                self._offer(place, min(end, len(place.sequence.token_ids)), step_id)
        ended: list[SlotId] = []
        if rows:  # else nothing is sent that could carry them
            ended, self._ended_slots = self._ended_slots, []
        return AppliedStep(
            step_id=step_id,
            ended_slots=ended,
            copies=copies,
            placed=[row.placement for row in rows[first_admitted:]],
            rows=rows,
            num_decodes=num_decodes,
            num_tokens=num_decodes + num_from_last + num_known,
            num_known=num_known,
            planned_s=now_s,
            num_evicted=self.pool.num_evicted - num_evicted,
            budget=plan.budget,
            expected_s=plan.expected_s,
            shortage=plan.shortage,
        )

    def executed(self, placement: Placement, end: int, step_id: StepId) -> None:
        """The KV of positions below `end` is there; of surplus tokens it is nobody's."""
        sequence = placement.sequence
        known = len(sequence.token_ids)
        if end < known:
            known = end
        placement.num_computed = known
        placement.has_run = True
        unconfirmed = placement.unconfirmed
        while unconfirmed and unconfirmed[0][0] <= step_id:
            del self._unconfirmed[unconfirmed.popleft()[1]]
        if placement.relies_on:
            placement.relies_on = [link for link in placement.relies_on if link[1] > step_id]
        if known // self.capacity.block_size > placement.num_offered:
            self._offer(placement, known, None)
        if sequence.placement is not placement:
            self._keep_tail(placement)  # longer than when it left

    def retire(self, placement: Placement) -> None:
        """Ends a stay; blocks come back when the last step that touches them has run."""
        sequence = placement.sequence
        self._keep_tail(placement)
        self.cache.stop_filling(sequence.block_hashes[placement.num_offered :])
        self.pool.release(placement.block_ids, placement.last_step, sequence.turn or 0)
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

    def _place(self, admission: Admission, step_id: StepId, copies: list[BlockMove]) -> AppliedRow:
        sequence, start, count, num_new = admission
        new_blocks = self.pool.allocate(num_new)
        if start.copy_from is not None:
            copies.append(BlockMove(start.copy_from, new_blocks[0]))
            self.pool.release([start.copy_from], step_id)
        place = Placement(
            sequence=sequence,
            slot=self._free_slots.pop(),
            block_ids=start.held + new_blocks,
            num_planned=start.num_computed,
            num_computed=start.num_computed,
            num_offered=len(start.shared),
        )
        place.relies_on = [
            self._unconfirmed[block] for block in start.touched if block in self._unconfirmed
        ]
        leader = start.leader
        if leader is not None and leader.num_computed <= start.num_computed:
            place.relies_on.append((leader, leader.last_step))
        self.cache.start_filling(sequence.block_hashes[len(start.shared) :], sequence.priority)
        if sequence.turn is None:
            sequence.turn = self.cache.turn_of(start.held[-1]) if start.held else 0
        sequence.placement = place
        sequence.waits_for = None
        self.running.append(sequence)
        return self._advance(place, count, 0, step_id)

    def _advance(self, place: Placement, count: int, num_new: int, step_id: StepId) -> AppliedRow:
        new_blocks: Seq[BlockId] = ()
        if num_new:
            new_blocks = self.pool.allocate(num_new)
            place.block_ids += new_blocks
        sequence, first = place.sequence, place.num_planned
        end = first + count
        samples = end == len(sequence.token_ids) + place.num_sampling
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
        if not self._caching:
            return
        sequence = place.sequence
        self.hash_blocks(sequence)
        for index in range(place.num_offered, end // block_size):
            block_id, parent = place.block_ids[index], sequence.parent_hash(index)
            token_ids = sequence.token_ids[index * block_size : (index + 1) * block_size]
            name, turn = sequence.block_hashes[index], sequence.turn_at((index + 1) * block_size)
            if not self.cache.publish(name, block_id, parent, token_ids, turn):
                continue
            if step_id is not None:
                place.unconfirmed.append((step_id, block_id))
                self._unconfirmed[block_id] = (place, step_id)
        place.num_offered = end // block_size

    def _keep_tail(self, place: Placement) -> None:
        """What a placement that is over has of its last block stays findable."""
        end, sequence = place.num_computed, place.sequence
        index, count = divmod(end, self.capacity.block_size)
        if not (self._caching and count and place.has_run):
            return
        parent = sequence.parent_hash(index)
        if index == 0 or self.cache.is_published(parent):
            token_ids = sequence.token_ids[end - count : end]
            share, turn = count / self.capacity.block_size, sequence.turn_at(end)
            self.cache.keep_tail(place.block_ids[index], parent, token_ids, share, turn)

    def _withdraw(self, placement: Placement) -> None:
        for _, block_id in placement.unconfirmed:
            del self._unconfirmed[block_id]
            self.cache.withdraw(block_id)
        placement.unconfirmed.clear()

    def _reset_slots(self) -> None:
        self._free_slots = [SlotId(i) for i in reversed(range(self.capacity.max_num_seqs))]
        self._ended_slots = []


def _num_decodes(rows: list[AppliedRow]) -> int:
    """How many of the first rows are decodes in the blocks that they have."""
    for index, row in enumerate(rows):
        if not row.from_last or row.new_block_ids:
            return index
    return len(rows)
