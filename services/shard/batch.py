"""A step's active rows packed into one sequence of tokens, as arrays on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from services.shard.slots import ActiveRow

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows in packed order: `order` gives each packed row's place in the rows passed in.

    Attributes:
        token_ids, positions, token_slots: [num_tokens]; the slot is block * block_size + offset.
        block_tables: [rows, blocks in use].
        query_lens, context_lens: [rows].
        sampled: packed rows that sample.
        logit_indices: packed position of the last token of each sampled row.
        long_rope: [num_tokens], true where the row's sequence is a long one; None where none is.
    """

    order: Sequence[int]
    token_ids: Ints
    positions: Ints
    token_slots: Ints
    block_tables: Ints
    query_lens: Ints
    context_lens: Ints
    sampled: Sequence[int]
    logit_indices: Ints
    long_rope: npt.NDArray[np.bool_] | None = None


def pack(rows: Sequence[ActiveRow], block_tables: Ints, block_size: int) -> Batch:
    """Packs rows; those with one token come first, longest context first, so that the buckets of
    the attention plan are slices of the packed tokens."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i].num_tokens > 1, -rows[i].context_len))
    packed = [rows[i] for i in order]
    query_lens = np.array([row.num_tokens for row in packed], dtype=np.int64)
    starts = np.array([row.start for row in packed], dtype=np.int64)
    context_lens = starts + query_lens
    ends = np.cumsum(query_lens)
    num_blocks = -(-int(context_lens.max()) // block_size)
    tables = block_tables[[row.sequence.new.slot for row in packed], :num_blocks]
    row_of_token = np.repeat(np.arange(len(packed)), query_lens)
    positions = np.arange(int(ends[-1])) - np.repeat(ends - query_lens - starts, query_lens)
    blocks = tables[row_of_token, positions // block_size]
    is_long = [row.sequence.new.long_rope for row in packed]
    sampled = [i for i, row in enumerate(packed) if row.sample]
    return Batch(
        order=order,
        token_ids=np.array([t for row in packed for t in row.token_ids], dtype=np.int64),
        positions=positions,
        token_slots=blocks * block_size + positions % block_size,
        block_tables=tables,
        query_lens=query_lens,
        context_lens=context_lens,
        sampled=sampled,
        logit_indices=ends[sampled] - 1,
        long_rope=np.array(is_long)[row_of_token] if any(is_long) else None,
    )


def padded(batch: Batch, multiple: int) -> Batch:
    """The batch with tokens that belong to no row, up to a multiple of them, and the same for the
    rows of logits. `token_slots` stays as it is: what is not a row's has no place in the pool."""
    room = -len(batch.token_ids) % multiple
    spare = -len(batch.logit_indices) % multiple
    long = batch.long_rope
    return replace(
        batch,
        token_ids=np.pad(batch.token_ids, (0, room)),
        positions=np.pad(batch.positions, (0, room)),
        logit_indices=np.pad(batch.logit_indices, (0, spare)),
        long_rope=None if long is None else np.pad(long, (0, room)),
    )
