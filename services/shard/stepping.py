"""One step from request to outcome: the slots' rules around the engine's computation."""

from __future__ import annotations

import time
from collections.abc import Callable

from services.shard.containment import ContainedEngine
from services.shard.domain import RowOutcome, RowStatus, Step, StepOutcome, Timings
from services.shard.engine import Draw, LoadedModel
from services.shard.slots import ActiveRow, SlotTable
from services.shard.spans import SequenceSpans

_MAX_UINT32 = 2**32 - 1


class StepRunner:
    """Executes steps in the order given; lives in the worker thread."""

    def __init__(self, model: LoadedModel, now_s: Callable[[], float] = time.perf_counter) -> None:
        self._engine = ContainedEngine(model.engine)
        self._now_s = now_s
        self.num_executed = 0
        self._spans = SequenceSpans()
        self.slots = SlotTable(
            model.capacity, model.manifest.max_model_len, model.manifest.vocab_size
        )

    def reset(self) -> None:
        """A new epoch: every slot is empty, the blocks stay."""
        self.slots.reset()
        self._spans.reset()

    def execute(self, step: Step, idle_s: float) -> StepOutcome:
        """Runs one step.

        Raises:
            ProtocolViolation: the step contradicts the slots' state.
            Exception: the computation failed as a whole.
        """
        start_s = self._now_s()
        applied = self.slots.apply(step)
        self._spans.begin(step)
        if applied.block_copies:
            self._engine.copy_blocks(applied.block_copies)
        outcomes = applied.outcomes
        sample_s = 0.0
        if applied.active:
            computed = self._engine.compute(applied.active, self.slots.block_tables)
            sample_s = computed.sample_s
            for row, draw in zip(applied.active, computed.draws, strict=True):
                outcomes[row.index] = self._settle(row, draw)
        self._spans.ran(step)
        self.num_executed += 1
        return StepOutcome(
            step.epoch,
            step.step_id,
            [outcome for outcome in outcomes if outcome is not None],
            Timings(_us(idle_s), _us(self._now_s() - start_s), _us(sample_s)),
            step.num_decodes,
        )

    def _settle(self, row: ActiveRow, draw: Draw) -> RowOutcome:
        if draw.error is not None:
            return self.slots.fail(row, draw.error)
        self.slots.commit(row, draw.token_id)
        return RowOutcome(row.sequence.new.slot, RowStatus.OK, draw.token_id, draw.logprobs)


def _us(seconds: float) -> int:
    return min(_MAX_UINT32, max(0, round(seconds * 1e6)))
