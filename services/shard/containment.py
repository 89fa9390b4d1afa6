"""What a failing computation costs whom: the row that causes it, not the step.

Wraps an engine. A computation has no committed state, and what it writes is what a repetition
writes, so a step that raised is computed again in halves:

    out of memory   until the halves fit, a row's tokens too; one token that does not fit fails
                    alone. What did not fit is remembered, and the next steps are cut in advance.
    anything else   until the row that raises is alone; it fails with an error of its own. Where
                    every row raises, the device is broken and the step has failed as a whole.

A row that was alone in its step proves nothing about the device: the step fails as a whole, and the
scheduler tries those in it one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from infermesh.errors import Internal, MeshError, OutOfMemory
from infermesh.telemetry import logs, metrics
from services.shard.batch_limit import BatchLimit
from services.shard.domain import BlockId
from services.shard.engine import Computed, Draw, Engine
from services.shard.slots import ActiveRow

_log = logs.get(__name__)
_splits = metrics.counter(
    "shard_batch_splits_total",
    "Batches computed in parts: after an error, for want of memory, or within a known limit.",
    ("reason",),
)
# How torch says it on a CPU, and what other libraries say.
_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")

Tables = npt.NDArray[np.int64]


class ContainedEngine:
    """Implements Engine over another one; lives in the worker thread."""

    def __init__(self, engine: Engine, limit: BatchLimit | None = None) -> None:
        self._engine = engine
        self._limit = limit or BatchLimit()

    def copy_blocks(self, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        """As the engine does."""
        self._engine.copy_blocks(pairs)

    def compute(self, rows: Sequence[ActiveRow], block_tables: Tables) -> Computed:
        """One draw per row, from as few computations as it takes.

        Raises:
            MeshError: what the engine raised of that kind: the step contradicts the model.
            Exception: every row's computation raised the same.
        """
        attempt = _Attempt(self._engine, block_tables, self._limit, rows)
        parts = cut(list(enumerate(rows)), self._limit.tokens)
        if len(parts) > 1:
            _splits.labels("limit").inc()
        before = self._limit.tokens
        for part in parts:
            attempt.run(part)
        self._limit.settle(before, attempt.num_fitted, attempt.is_size)
        if len(parts) > 1:
            self._limit.kept()
        return attempt.result()


# Rows with their places in the step.
Part = list[tuple[int, ActiveRow]]


class _Attempt:
    """One step on its way: draws so far, and what its rows raised."""

    def __init__(
        self, engine: Engine, block_tables: Tables, limit: BatchLimit, rows: Sequence[ActiveRow]
    ) -> None:
        self._engine = engine
        self._block_tables = block_tables
        self._limit = limit
        self._rows = rows
        self._draws: list[Draw] = [Draw()] * len(rows)
        self._raised: dict[int, Exception] = {}
        self._sample_s = 0.0
        # Most query tokens that fitted at once, and whether none was too many alone.
        self.num_fitted, self.is_size = 0, True

    def run(self, part: Part) -> None:
        """Computes a part, in halves where it must be."""
        # A row's later tokens rely on its earlier ones.
        part = [(place, row) for place, row in part if self._draws[place].error is None]
        if not part:
            return
        error = self._try(part)
        if error is None:
            return
        # Outside of the handler, whose frames hold the memory of what failed.
        if is_out_of_memory(error):
            self._limit.refused(num_tokens(part))
            halves = cut(part, -(-num_tokens(part) // 2)) if num_tokens(part) > 1 else []
            reason = "out_of_memory"
        else:
            middle = len(part) // 2
            halves = [part[:middle], part[middle:]] if middle else []
            reason = "error"
        if not halves:
            self._fail(part[0][0], error)
            return
        _splits.labels(reason).inc()
        for half in halves:
            self.run(half)

    def result(self) -> Computed:
        """Raises what every row raised, if it is of one kind."""
        raised = list(self._raised.values())
        if len(raised) == len(self._draws) and len({type(error) for error in raised}) == 1:
            raise raised[0]
        for place, error in self._raised.items():
            request = {"traceparent": self._rows[place].sequence.new.traceparent}
            _log.error("a row's computation failed", exc_info=error, extra=request)
        return Computed(self._draws, self._sample_s)

    def _try(self, part: Part) -> Exception | None:
        try:
            computed = self._engine.compute([row for _, row in part], self._block_tables)
        except MeshError as error:
            if not isinstance(error, OutOfMemory):
                raise
            return error.with_traceback(None)
        except Exception as error:
            last = len(part) == 1 and not is_out_of_memory(error)
            return error if last else error.with_traceback(None)
        self._sample_s += computed.sample_s
        self.num_fitted = max(self.num_fitted, num_tokens(part))
        for (place, _), draw in zip(part, computed.draws, strict=True):
            self._draws[place] = draw
        return None

    def _fail(self, place: int, error: Exception) -> None:
        if is_out_of_memory(error):
            self.is_size = False
            self._draws[place] = Draw(error=OutOfMemory("the device has no memory for one token"))
            return
        self._raised[place] = error
        # The type alone: a message may quote the prompt.
        name = type(error).__name__
        self._draws[place] = Draw(error=Internal(f"computing this request failed: {name}"))


def num_tokens(part: Part) -> int:
    """Query tokens of all rows."""
    return sum(row.num_tokens for _, row in part)


def cut(part: Part, limit: int | None) -> list[Part]:
    """Parts of at most `limit` query tokens, in order; a row may be cut between its tokens, and
    only its last piece samples."""
    if limit is None or num_tokens(part) <= limit:
        return [part]
    parts: list[Part] = [[]]
    room = limit
    for place, row in part:
        done = 0
        while done < row.num_tokens:
            if room == 0:
                parts.append([])
                room = limit
            taken = min(room, row.num_tokens - done)
            parts[-1].append((place, _piece(row, done, taken)))
            done += taken
            room -= taken
    return parts


def _piece(row: ActiveRow, done: int, taken: int) -> ActiveRow:
    if taken == row.num_tokens:
        return row
    end = done + taken
    return dataclasses.replace(
        row,
        token_ids=row.token_ids[done:end],
        start=row.start + done,
        sample=row.sample and end == row.num_tokens,
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether less work might do. Torch has a type for it on CUDA, and a sentence on a CPU."""
    if isinstance(error, MemoryError | OutOfMemory) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in _NO_MEMORY)
