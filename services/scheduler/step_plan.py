"""What the planner reads and what it answers. Plain data; `plan.py` decides, `Ledger` applies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from services.scheduler.blocks import BlockPool
from services.scheduler.ids import BlockHash, BlockId
from services.scheduler.prefix_cache import PrefixCache
from services.scheduler.queue import WaitingQueue
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
