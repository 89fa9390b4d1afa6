"""What the next step runs. A pure function over plain data: no clock, no I/O, nothing is changed.

A step maps sequences to numbers of tokens; there are no prefill or decode phases. In order:

1. Running sequences with one token to go (decodes): a long prompt never stalls running streams.
2. Class by class: chunks of prompts that run already, then admissions from the waiting queue.
3. A sequence that outgrew its rotary tables gives up its place, to be computed anew.
4. Where a running sequence needs a block and none is left, the lowest, youngest one is preempted.

Who waits in which order is `WaitingQueue`'s affair, what a plan does to the books `Ledger`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from services.scheduler.blocks import BlockPool
from services.scheduler.ids import BlockHash, BlockId
from services.scheduler.prefix_cache import PrefixCache
from services.scheduler.queue import PRIORITIES, WaitingQueue
from services.scheduler.sequence import Placement, Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step may hold."""

    max_batch_tokens: int
    block_size: int
    # Waiting sequences looked at per plan.
    max_candidates: int = 256
    # A sequence that grows past it gives up its place: all it computed is void. 0: none does.
    rope_switch_len: int = 0


@dataclass(slots=True)
class PlanState:
    """What the planner reads."""

    running: list[Sequence]
    waiting: WaitingQueue
    pool: BlockPool
    cache: PrefixCache
    num_free_slots: int
    num_steps_in_flight: int
    # A suspect of crashing the device: nobody else may run.
    solo: Sequence | None = None


class PlannedRow(NamedTuple):
    """`num_tokens` more of a running sequence."""

    sequence: Sequence
    num_tokens: int
    num_new_blocks: int


class Start(NamedTuple):
    """Where an admitted sequence's computation begins."""

    num_computed: int
    shared: list[BlockId]
    # A fork copies its sibling's partial prompt block.
    copy_from: BlockId | None = None
    leader: Placement | None = None


class Admission(NamedTuple):
    """A waiting sequence that gets a place, with its first `num_tokens`."""

    sequence: Sequence
    start: Start
    num_tokens: int
    num_new_blocks: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Applied in the order: admissions hold what they share, preempted release, rows grow."""

    rows: list[PlannedRow]
    admissions: list[Admission]
    preempted: list[Sequence]
    # They fill the whole pool alone and still need a block.
    out_of_memory: list[Sequence]
    # Waiting ones, with the block that a running sequence is about to compute for them.
    deferred: list[tuple[Sequence, BlockHash]]

    @property
    def is_empty(self) -> bool:
        return not (self.rows or self.admissions)

    @property
    def frees_places(self) -> bool:
        """Another plan may find room where this one found none."""
        return bool(self.preempted or self.out_of_memory)


def plan(state: PlanState, limits: Limits) -> StepPlan:
    """The next step; empty where nothing can run now."""
    draft = _Draft(
        state, limits, limits.max_batch_tokens, state.pool.num_available, state.pool.has_quarantine
    )
    decodes, prefills = draft.split_running()
    draft.plan_decodes(decodes)
    for priority in PRIORITIES:
        for sequence in prefills[priority]:
            draft.plan_prefill(sequence)
        draft.admit_class(priority)
    return StepPlan(
        draft.rows, draft.admissions, draft.preempted, draft.out_of_memory, draft.deferred
    )


def find_start(
    sequence: Sequence, cache: PrefixCache, block_size: int
) -> tuple[Start, BlockHash | None]:
    """The most that `sequence` need not compute, and the first block hash that was missing.

    At least its last known token is left to compute: logits come from there. A fork takes its
    sibling's prompt up to the last token, which it computes itself: one block, one writer.
    """
    max_blocks = (len(sequence.token_ids) - 1) // block_size
    match = cache.match(sequence.block_hashes, max_blocks)
    start = Start(len(match.block_ids) * block_size, match.block_ids)
    fork_at = sequence.prompt_len - 1
    leader = leader_of(sequence)
    if leader is not None and leader.sequence.is_long != sequence.is_long:
        return start, match.missing
    if leader is None or leader.num_planned < fork_at or start.num_computed >= fork_at:
        return start, match.missing
    full, rest = divmod(fork_at, block_size)
    source = leader.block_ids[full] if rest else None
    return Start(fork_at, leader.block_ids[:full], source, leader), None


def leader_of(sequence: Sequence) -> Placement | None:
    """The running choice of the same request that is furthest, if one runs."""
    best: Placement | None = None
    siblings = sequence.request.sequences
    if len(siblings) > 1:
        for sibling in siblings:
            place = sibling.placement
            if place is not None and (best is None or place.num_planned > best.num_planned):
                best = place
    return best


@dataclass(slots=True)
class _Draft:
    """A plan in the making, and what is left to give away."""

    state: PlanState
    limits: Limits
    budget: int
    available: int
    # Blocks come back when steps in flight have run: wait rather than preempt another.
    blocks_coming: bool
    rows: list[PlannedRow] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    out_of_memory: list[Sequence] = field(default_factory=list)
    deferred: list[tuple[Sequence, BlockHash]] = field(default_factory=list)
    # Blocks that running prefills and admissions of this plan will still need for known tokens.
    committed: int = 0
    claimed: set[BlockId] = field(default_factory=set)
    filling: set[BlockHash] = field(default_factory=set)
    num_looked_at: int = 0
    # No admission after a preemption or a candidate that did not fit: none may overtake it.
    is_closed: bool = False

    def split_running(self) -> tuple[list[Sequence], dict[int, list[Sequence]]]:
        """Those with one token to go, and those with more; finished lengths are left out."""
        decodes: list[Sequence] = []
        prefills: dict[int, list[Sequence]] = {priority: [] for priority in PRIORITIES}
        for sequence in self.state.running:
            place = sequence.placement
            assert place is not None
            end = len(sequence.token_ids) + place.num_sampling
            if end >= sequence.max_len:  # its last token is on its way
                self.blocks_coming = True
                continue
            if 0 < self.limits.rope_switch_len < end and not sequence.is_long:
                self._outgrew(sequence)
                continue
            if end - place.num_planned == 1:
                decodes.append(sequence)
            else:
                prefills[sequence.priority].append(sequence)
                self.committed += self._blocks_for(end + 1) - len(place.block_ids)
        return decodes, prefills

    def _outgrew(self, sequence: Sequence) -> None:
        """Its next token needs the other rotary tables, and with them all before it anew."""
        if sequence.num_in_flight:  # what they yield is still known by the old ones
            self.blocks_coming = True
        else:
            self.preempted.append(sequence)

    def plan_decodes(self, decodes: list[Sequence]) -> None:
        if len(decodes) > self.budget:  # take turns
            decodes.sort(key=_turn)
        block_size = self.limits.block_size
        short: list[Sequence] = []
        for sequence in decodes[: self.budget]:
            place = sequence.placement
            assert place is not None
            if place.num_planned < len(place.block_ids) * block_size:
                self.rows.append(PlannedRow(sequence, 1, 0))
            elif self.available > 0:
                self.available -= 1
                self.rows.append(PlannedRow(sequence, 1, 1))
            else:
                short.append(sequence)
        self.budget -= len(self.rows)
        for sequence in short:
            if sequence not in self.preempted and self._make_room(sequence):
                self.available -= 1
                self.budget -= 1
                self.rows.append(PlannedRow(sequence, 1, 1))

    def plan_prefill(self, sequence: Sequence) -> None:
        place = sequence.placement
        assert place is not None
        if self.budget <= 0 or sequence in self.preempted:
            return
        held, block_size = len(place.block_ids), self.limits.block_size
        is_short = (held + self.available) * block_size <= place.num_planned
        if is_short and not self._make_room(sequence):
            return
        room = (held + self.available) * block_size - place.num_planned
        count = min(place.end - place.num_planned, self.budget, room)
        new_blocks = max(0, self._blocks_for(place.num_planned + count) - held)
        self._take(count, new_blocks)
        self.committed -= new_blocks
        self.rows.append(PlannedRow(sequence, count, new_blocks))

    def admit_class(self, priority: int) -> None:
        """Admits the waiting of one class in their order until one does not fit."""
        line, solo = self.state.waiting.in_class(priority), self.state.solo
        if solo is not None:
            alone = solo.placement is None and self.state.num_steps_in_flight == 0
            line = [solo] if alone and solo.priority == priority else []
        for sequence in line:
            if self.is_closed or self.budget <= 0:
                return
            if self.num_looked_at >= self.limits.max_candidates:
                return
            self.num_looked_at += 1
            if not self._must_wait(sequence):
                self._try_admit(sequence)

    def _must_wait(self, sequence: Sequence) -> bool:
        """True where waiting is cheaper than running, or it is not this one's turn."""
        if sequence.num_in_flight:
            return True
        if sequence.waits_for is not None and sequence.waits_for in self.state.cache.filling:
            return True
        if len(sequence.request.sequences) == 1:
            return False
        leader = leader_of(sequence)
        if leader is not None:  # until the leader's prompt is on its way
            return leader.num_planned < sequence.prompt_len
        return any(other.sequence.request is sequence.request for other in self.admissions)

    def _try_admit(self, sequence: Sequence) -> None:
        state, known = self.state, len(sequence.token_ids)
        if self._blocks_for(known) > state.pool.num_blocks:
            self.out_of_memory.append(sequence)
            return
        start, missing = find_start(sequence, state.cache, self.limits.block_size)
        if missing is not None and (missing in state.cache.filling or missing in self.filling):
            self.deferred.append((sequence, missing))
            return
        idle = [b for b in start.shared if state.pool.is_cached(b) and b not in self.claimed]
        available = self.available - len(idle)
        if not self._fits(sequence, start, available):
            self.is_closed = True
            self._yield_to(sequence)
            return
        self.available = available
        self.claimed.update(idle)
        held = len(start.shared)
        room = (held + available) * self.limits.block_size - start.num_computed
        count = min(known - start.num_computed, self.budget, room)
        new_blocks = self._blocks_for(start.num_computed + count) - held
        self._take(count, new_blocks)
        self.committed += self._blocks_for(known + 1) - held - new_blocks
        self.filling.update(sequence.block_hashes[held:])
        self.admissions.append(Admission(sequence, start, count, new_blocks))

    def _fits(self, sequence: Sequence, start: Start, available: int) -> bool:
        """Room for all it knows, for what runs already, and one block for each that runs.

        The margin keeps a sequence that was just preempted from being admitted and preempted again.
        """
        state = self.state
        num_running = len(state.running) + len(self.admissions)
        if state.num_free_slots <= len(self.admissions):
            return False
        if num_running == 0 and state.pool.num_used == 0:
            return True
        needed = self._blocks_for(len(sequence.token_ids) + 1) - len(start.shared)
        return available - self.committed - num_running >= needed

    def _yield_to(self, sequence: Sequence) -> None:
        """A lower class makes way for a waiting higher one, one sequence per plan."""
        victim = self._victim()
        if not self.blocks_coming and victim is not None and victim.priority < sequence.priority:
            self._preempt(victim)
            self.blocks_coming = True

    def _make_room(self, sequence: Sequence) -> bool:
        """Gets one block for a running sequence; False where it must wait, or was itself chosen."""
        self.is_closed = True
        while self.available < 1:
            victim = self._victim()
            if self.blocks_coming or victim is None:
                return False
            if victim is sequence and len(self.state.running) == 1:
                if sequence.num_in_flight == 0:
                    self.out_of_memory.append(sequence)
                return False
            if victim is sequence and len(self.preempted) == len(self.state.running) - 1:
                return False  # the last one left: the next plan counts what the others held
            gain = self._preempt(victim)
            if victim is sequence:
                return False
            if victim.num_in_flight or self.admissions:
                # Its blocks are touched by steps in flight, or may be shared by who was just
                # admitted: they count when they are back.
                self.blocks_coming = True
            else:
                self.available += gain
        return True

    def _victim(self) -> Sequence | None:
        """Lowest class, then youngest, of those still running."""
        left = [s for s in self.state.running if s not in self.preempted]
        return max(left, key=_youth, default=None)

    def _preempt(self, victim: Sequence) -> int:
        """Takes its row back; returns the blocks that nobody else holds."""
        self.preempted.append(victim)
        self.is_closed = True
        for row in self.rows:
            if row.sequence is victim:
                self.rows.remove(row)
                self._take(-row.num_tokens, -row.num_new_blocks)
                break
        assert victim.placement is not None
        return self.state.pool.num_exclusive(victim.placement.block_ids)

    def _take(self, num_tokens: int, num_blocks: int) -> None:
        self.budget -= num_tokens
        self.available -= num_blocks

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)


def _turn(sequence: Sequence) -> tuple[int, int]:
    assert sequence.placement is not None
    return -sequence.priority, sequence.placement.last_step


def _youth(sequence: Sequence) -> tuple[int, tuple[int, int]]:
    return -sequence.priority, sequence.order
