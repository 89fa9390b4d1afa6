"""What the planner reads and what it answers. Plain data; `plan.py` decides, `Ledger` applies."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from infermesh.block_hash import BlockHash
from services.scheduler.blocks import BlockPool
from services.scheduler.ids import BlockId
from services.scheduler.prefix_cache import PrefixCache
from services.scheduler.queue import WaitingQueue
from services.scheduler.sequence import Placement, Sequence
from services.scheduler.token_budget import StepTarget


class Shortage(enum.Enum):
    """What the next waiting sequence had no place for want of."""

    SLOTS = "slots"
    KV_BLOCKS = "kv_blocks"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step may hold."""

    max_batch_tokens: int
    block_size: int
    # Waiting sequences looked at per plan.
    max_candidates: int = 256
    # A sequence that grows past it gives up its place: all it computed is void. 0: none does.
    rope_switch_len: int = 0
    # Of a step with decodes; None: it may take as long as it does.
    target: StepTarget | None = None


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
    # A block of which it needs a part: its sibling's, of whom it is a fork, or a kept one.
    copy_from: BlockId | None = None
    leader: Placement | None = None
    # A kept tail that nobody holds: it becomes its own.
    tail: BlockId | None = None

    @property
    def held(self) -> list[BlockId]:
        """The blocks that it has from the start."""
        return self.shared if self.tail is None else [*self.shared, self.tail]

    @property
    def touched(self) -> list[BlockId]:
        """Those, and what it copies."""
        return self.held if self.copy_from is None else [*self.shared, self.copy_from]

    def num_from_part(self, block_size: int) -> int:
        """Its tokens that were found in a part of a block."""
        return 0 if self.leader is not None else self.num_computed - len(self.shared) * block_size


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
    # Query tokens that the step could have held.
    budget: int = 0
    # Where a target was to be kept.
    expected_s: float | None = None
    # Why it admits no more; None where nobody is left who could be.
    shortage: Shortage | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.rows or self.admissions)

    @property
    def frees_places(self) -> bool:
        """Another plan may find room where this one found none."""
        return bool(self.preempted or self.out_of_memory)
