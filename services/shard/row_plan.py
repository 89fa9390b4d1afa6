"""What is asked of each sampled row, as arrays: one table for torch and for the C++ kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from services.shard.exact_weights import LOG2_E
from services.shard.noise import Purpose, uniforms
from services.shard.slots import ActiveRow

# Largest count of top logprobs that is served. Always as many, so that rows are alike.
MOST_TOP = 20
_LEAST_TEMPERATURE = 1e-6

# As `Row` in kernels/cpp/sampling.cpp. A row's edits are those from the previous row's end to its
# own.
ROW = np.dtype(
    [
        ("noise", np.float64),
        ("top_p", np.float64),  # 1: cuts nothing
        ("bias_end", np.int64),
        ("history_end", np.int64),
        ("suppressed_end", np.int64),
        ("scale", np.float32),  # log2(e) / temperature; 0: greedy
        ("least", np.float32),  # log2(min_p)
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
        ("top_k", np.int32),  # 0: cuts nothing
        ("described", np.int32),  # whether logprobs are asked for
        ("unused", np.int32),
    ]
)

Table = npt.NDArray[np.void]
Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]


def _no_ids() -> Ids:
    return np.zeros(0, dtype=np.int64)


def _no_values() -> Values:
    return np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The table, and the edits of all rows one after the other: ids with an addend, ids with their
    count in the output, ids that must not come."""

    table: Table
    bias_ids: Ids = field(default_factory=_no_ids)
    bias: Values = field(default_factory=_no_values)
    history_ids: Ids = field(default_factory=_no_ids)
    output_counts: Values = field(default_factory=_no_values)
    suppressed_ids: Ids = field(default_factory=_no_ids)

    @property
    def edits(self) -> bool:
        """Whether any logit is changed before the draw."""
        return bool(len(self.bias_ids) or len(self.history_ids) or len(self.suppressed_ids))


def plan_rows(rows: Sequence[ActiveRow], vocab: int) -> RowPlan:
    """The table, with noise drawn for the rows that are not greedy."""
    table = np.zeros(len(rows), dtype=ROW)
    sampling = [row.sequence.new.sampling for row in rows]
    table["described"] = [s.top_logprobs is not None for s in sampling]
    drawn = [i for i, s in enumerate(sampling) if not s.greedy]
    if drawn:
        table["noise"][drawn] = uniforms(
            [sampling[i].seed or 0 for i in drawn],
            [rows[i].sequence.new.choice for i in drawn],
            [rows[i].context_len for i in drawn],
            Purpose.SAMPLE,
        )
        warmth = np.array([sampling[i].temperature for i in drawn])
        table["scale"][drawn] = LOG2_E / np.maximum(warmth, _LEAST_TEMPERATURE)
        table["top_p"] = [s.top_p for s in sampling]
        table["top_k"] = [s.top_k if s.top_k < vocab else 0 for s in sampling]
        table["least"] = [math.log2(s.min_p) if s.min_p > 0 else -math.inf for s in sampling]
    return _with_edits(table, rows)


def _with_edits(table: Table, rows: Sequence[ActiveRow]) -> RowPlan:
    maps = [row.sequence.new.sampling.logit_bias for row in rows]
    histories = [row.sequence.history for row in rows]
    suppressed = [
        new.suppressed_token_ids
        if new.suppressed_token_ids and row.num_output_tokens < new.min_tokens
        else ()
        for row in rows
        for new in (row.sequence.new,)
    ]
    edits: dict[str, npt.NDArray[np.generic]] = {}
    if any(maps):
        table["bias_end"] = np.cumsum([len(bias) for bias in maps])
        edits["bias_ids"] = np.array([token for bias in maps for token in bias], dtype=np.int64)
        edits["bias"] = np.array([v for bias in maps for v in bias.values()], dtype=np.float32)
    if any(history is not None for history in histories):
        present = [history for history in histories if history is not None]
        lens = [0 if history is None else len(history.token_ids) for history in histories]
        table["history_end"] = np.cumsum(lens)
        edits["history_ids"] = np.concatenate([history.token_ids for history in present])
        edits["output_counts"] = np.concatenate([history.output_counts for history in present])
        for name in ("repetition", "frequency", "presence"):
            table[name] = [getattr(row.sequence.new.sampling, f"{name}_penalty") for row in rows]
    if any(suppressed):
        table["suppressed_end"] = np.cumsum([len(ids) for ids in suppressed])
        edits["suppressed_ids"] = np.array([t for ids in suppressed for t in ids], dtype=np.int64)
    return RowPlan(table, **edits)  # type: ignore[arg-type]
