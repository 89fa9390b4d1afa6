"""A plan in the making: what it gave away, what is left, and how room is made by preemption.

Who gets what is `plan.py`'s; who must give up a place is decided here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from infermesh.block_hash import BlockHash
from services.scheduler.fairness import counter_of
from services.scheduler.ids import BlockId
from services.scheduler.sequence import Sequence
from services.scheduler.step_plan import (
    Admission,
    Limits,
    PlannedRow,
    PlanState,
    Shortage,
    StepPlan,
)
from services.scheduler.token_budget import TimeLeft


@dataclass(slots=True)
class Draft:
    """A plan in the making, and what is left to give away."""

    state: PlanState
    limits: Limits
    budget: int
    available: int
    # Blocks come back when steps in flight have run: wait rather than preempt another.
    blocks_coming: bool
    # For known tokens, where the step has decodes and a target.
    time: TimeLeft | None = None
    num_decodes: int = 0
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
    shortage: Shortage | None = None
    # No admission after a preemption or a candidate that did not fit: none may overtake it.
    is_closed: bool = False

    def finish(self) -> StepPlan:
        """The plan as it stands."""
        return StepPlan(
            self.rows,
            self.admissions,
            self.preempted,
            self.out_of_memory,
            self.deferred,
            self._total_budget,
            None if self.time is None else self.time.expected_s,
            self._why_no_more(),
        )

    def _why_no_more(self) -> Shortage | None:
        """Who was looked at and had no place says why; else the step itself may be full."""
        if self.shortage is not None or len(self.state.waiting) <= len(self.admissions):
            return self.shortage
        return Shortage.TOKENS if self.is_full else None

    def start_clock(self) -> None:
        """The decodes are planned: what comes beside them must not hold them up for long."""
        target = self.limits.target
        if target is None or not self.rows:
            return
        self.num_decodes, context = len(self.rows), 0
        for row in self.rows:
            assert row.sequence.placement is not None
            context += row.sequence.placement.num_planned + 1
        self.time = target.beside(self.num_decodes, context)

    @property
    def is_full(self) -> bool:
        """No more known tokens."""
        return self.budget <= 0 or (self.time is not None and self.time.is_spent)

    def most_from(self, first: int) -> int:
        """The most known tokens of one sequence, from position `first` on, that may be added."""
        return self.budget if self.time is None else min(self.budget, self.time.tokens_from(first))

    def retire_outgrown(self, sequence: Sequence) -> None:
        """Its next token needs the other rotary tables, and with them all before it anew."""
        if sequence.num_in_flight:  # what they yield is still known by the old ones
            self.blocks_coming = True
        else:
            self.preempted.append(sequence)

    def yield_to(self, sequence: Sequence) -> None:
        """A lower class makes way for a waiting higher one, one sequence per plan."""
        victim = self._victim()
        if not self.blocks_coming and victim is not None and victim.priority < sequence.priority:
            self._preempt(victim)
            self.blocks_coming = True

    def make_room(self, sequence: Sequence) -> bool:
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
        """Of those still running: lowest class, then served most, then youngest."""
        left = [s for s in self.state.running if s not in self.preempted]
        return max(left, key=_dispensable, default=None)

    def _preempt(self, victim: Sequence) -> int:
        """Takes its row back; returns the blocks that nobody else holds."""
        self.preempted.append(victim)
        self.is_closed = True
        for row in self.rows:
            if row.sequence is victim:
                self.rows.remove(row)
                self.take(-row.num_tokens, -row.num_new_blocks)
                break
        assert victim.placement is not None
        return self.state.pool.num_exclusive(victim.placement.block_ids)

    def idle(self, block_ids: list[BlockId]) -> list[BlockId]:
        """Of these blocks, those that an admission takes from what is available."""
        is_cached, claimed = self.state.pool.is_cached, self.claimed
        return [one for one in block_ids if is_cached(one) and one not in claimed]

    def take_known(self, first: int, num_tokens: int, num_blocks: int) -> None:
        """Counts known tokens from position `first` on off what is left."""
        self.take(num_tokens, num_blocks)
        if self.time is not None:
            self.time.take(first, num_tokens)

    def take(self, num_tokens: int, num_blocks: int) -> None:
        """Counts them off what is left; negative gives back."""
        self.budget -= num_tokens
        self.available -= num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """That hold so many tokens."""
        return -(-num_tokens // self.limits.block_size)

    @property
    def _total_budget(self) -> int:
        most = self.limits.max_batch_tokens
        return most if self.time is None else min(most, self.num_decodes + self.time.offered)


def _dispensable(sequence: Sequence) -> tuple[int, float, tuple[int, int]]:
    return -sequence.priority, counter_of(sequence), sequence.order
