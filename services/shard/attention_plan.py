"""Who attends to what in one step, as indices: built once per step, used by every layer.

Decode rows (one query token) are batched in buckets of similar context length; other rows are
taken one sequence at a time, in chunks of queries. Holds no K or V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

# A bucket closes when its padding exceeds both this part of its real tokens and this many tokens.
MAX_PADDING_RATIO = 0.25
FREE_PADDING_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Limits:
    """Values held at once: gathered K or V of a decode bucket, and scores of a query chunk.

    On a CPU both fit the second-level cache; more makes attention several times slower.
    """

    gathered: int
    scores: int


CPU_LIMITS = Limits(gathered=1 << 20, scores=1 << 20)
CUDA_LIMITS = Limits(gathered=1 << 27, scores=1 << 26)


@dataclass(frozen=True, slots=True)
class DecodeBucket:
    """Rows with one query token each, padded to the longest of them."""

    # Packed query positions [rows]; a slice where they are neighbours.
    queries: slice | torch.Tensor
    num_rows: int
    padded_len: int
    # Rows of a pool seen as [tokens * num_kv_heads, head_dim]: [rows * num_kv_heads * padded_len]
    gather: torch.Tensor
    # [rows, 1, 1, padded_len], true where there is padding; None without padding.
    padding: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class QueryChunk:
    """Consecutive queries of one row, and the part of its gathered keys that any of them sees."""

    start: int  # packed position of the first query
    num_queries: int
    key_start: int
    key_end: int
    # True where a query must not see a key: [num_queries, n] over the last, or the first, n keys.
    future: torch.Tensor | None
    past: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """One row with several query tokens."""

    # Rows of a pool seen as [tokens, num_kv_heads * head_dim]
    gather: torch.Tensor
    chunks: Sequence[QueryChunk]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Everything that a layer with this window needs."""

    decode: Sequence[DecodeBucket]
    prefill: Sequence[PrefillRow]


@dataclass(slots=True)
class AttentionLayout:
    """One step's rows, packed one after another; gives the plan for each window once.

    Args:
        block_tables: [rows, blocks]; entries past a row's context are not read.
        query_lens: query tokens of each row, at least 1.
        context_lens: tokens of each row's sequence after this step, its query tokens included.
        num_heads: query heads.
    """

    block_tables: npt.NDArray[np.int64]
    query_lens: npt.NDArray[np.int64]
    context_lens: npt.NDArray[np.int64]
    block_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    device: torch.device
    _plans: dict[int | None, AttentionPlan] = field(default_factory=dict)
    _masks: dict[tuple[str, int, int, int], torch.Tensor] = field(default_factory=dict)

    @property
    def limits(self) -> Limits:
        return CPU_LIMITS if self.device.type == "cpu" else CUDA_LIMITS

    def plan(self, window: int | None) -> AttentionPlan:
        """The plan for layers that see the last `window` tokens, or all."""
        if window is not None and window >= int(self.context_lens.max(initial=0)):
            window = None  # nothing is out of sight yet
        if window not in self._plans:
            self._plans[window] = self._build(window)
        return self._plans[window]

    def _build(self, window: int | None) -> AttentionPlan:
        starts = np.cumsum(self.query_lens) - self.query_lens
        decode = np.flatnonzero(self.query_lens == 1)
        seen = self.context_lens if window is None else np.minimum(self.context_lens, window)
        max_tokens = max(1, self.limits.gathered // (self.num_kv_heads * self.head_dim))
        return AttentionPlan(
            [
                self._decode_bucket(rows, starts, seen)
                for rows in group_by_length(decode, seen[decode], max_tokens)
            ],
            [
                self._prefill_row(int(row), int(starts[row]), window)
                for row in np.flatnonzero(self.query_lens > 1)
            ],
        )

    def _decode_bucket(
        self,
        rows: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        seen: npt.NDArray[np.int64],
    ) -> DecodeBucket:
        lens, ends = seen[rows], self.context_lens[rows]
        padded = int(lens.max())
        # On the device: the index is as long as all contexts together, the tables are short.
        last = self._put(ends - 1)[:, None]
        first = self._put(ends - lens)[:, None]
        offsets = torch.arange(padded, device=self.device)
        # Padding repeats the row's own last token: finite memory that is the row's anyway.
        positions = torch.minimum(first + offsets, last)
        blocks = self._put(self.block_tables[rows]).gather(1, positions // self.block_size)
        tokens = blocks * self.block_size + positions % self.block_size
        heads = torch.arange(self.num_kv_heads, device=self.device)
        gather = tokens[:, None, :] * self.num_kv_heads + heads[None, :, None]
        padding = None
        if int(lens.min()) < padded:
            padding = (first + offsets > last)[:, None, None, :]
        packed = starts[rows]
        neighbours = bool((np.diff(packed) == 1).all())
        queries = slice(int(packed[0]), int(packed[-1]) + 1) if neighbours else self._put(packed)
        return DecodeBucket(queries, len(rows), padded, gather.view(-1), padding)

    def _prefill_row(self, row: int, packed_start: int, window: int | None) -> PrefillRow:
        num_queries, context = int(self.query_lens[row]), int(self.context_lens[row])
        first = context - num_queries  # position of the first query
        base = 0 if window is None else max(0, first - window + 1)  # position of the first key
        positions = np.arange(base, context)
        blocks = self.block_tables[row, positions // self.block_size]
        gather = blocks * self.block_size + positions % self.block_size
        most = max(16, self.limits.scores // (self.num_heads * (context - base)))
        chunks = []
        for done in range(0, num_queries, most):
            size = min(most, num_queries - done)
            position = first + done
            key_start = 0 if window is None else max(0, position - window + 1) - base
            key_end = position + size - base
            # Query i sees key j (from key_start) only where j > i + shift.
            shift = 0 if window is None else position - window - base - key_start
            num_past = 0 if window is None else min(size + shift, key_end - key_start)
            past = self._mask("past", size, num_past, shift) if num_past > 0 else None
            future = self._mask("future", size, size, 1) if size > 1 else None
            chunks.append(QueryChunk(packed_start + done, size, key_start, key_end, future, past))
        return PrefillRow(self._put(gather), chunks)

    def _mask(self, kind: str, num_queries: int, num_keys: int, diagonal: int) -> torch.Tensor:
        key = (kind, num_queries, num_keys, diagonal)
        if key not in self._masks:
            ones = np.ones((num_queries, num_keys), dtype=bool)
            mask = np.triu(ones, diagonal) if kind == "future" else np.tril(ones, diagonal)
            self._masks[key] = self._put(mask)
        return self._masks[key]

    def _put(self, array: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def group_by_length(
    rows: npt.NDArray[np.int64], lens: npt.NDArray[np.int64], max_tokens: int
) -> list[npt.NDArray[np.int64]]:
    """Splits rows into groups of similar length, longest first.

    A group holds at most `max_tokens` tokens with its padding (one row at least), and its padding
    stays below MAX_PADDING_RATIO of its real tokens, or FREE_PADDING_TOKENS where that is more.
    """
    groups: list[list[int]] = []
    longest = real = padded = 0
    order = np.argsort(-lens, kind="stable")
    for row, length in zip(rows[order].tolist(), lens[order].tolist(), strict=True):
        allowed = max(FREE_PADDING_TOKENS, MAX_PADDING_RATIO * (real + length))
        padding = padded + longest - (real + length)
        if not groups or padding > allowed or padded + longest > max_tokens:
            groups.append([])
            longest, real, padded = length, 0, 0
        groups[-1].append(row)
        real += length
        padded += longest
    return [np.array(group, dtype=np.int64) for group in groups]
