"""What is done to logits before a token is chosen: bias, penalties, suppressed tokens, in that
order. Sparse: only the tokens concerned are touched, for all rows at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from services.shard.slots import ActiveRow


def apply(logits: torch.Tensor, rows: Sequence[ActiveRow]) -> torch.Tensor:
    """The edited logits; the same tensor where no row asks for an edit, else a copy."""
    bias = [(i, row) for i, row in enumerate(rows) if row.sequence.new.sampling.logit_bias]
    penalized = [(i, row) for i, row in enumerate(rows) if row.sequence.history is not None]
    suppressed = [
        (i, row)
        for i, row in enumerate(rows)
        if row.sequence.new.suppressed_token_ids
        and row.num_output_tokens < row.sequence.new.min_tokens
    ]
    if not (bias or penalized or suppressed):
        return logits
    flat = logits.clone().view(-1)
    vocab = logits.shape[1]
    if bias:
        _add_bias(flat, vocab, bias)
    if penalized:
        _penalize(flat, vocab, penalized)
    if suppressed:
        ids = [np.array(row.sequence.new.suppressed_token_ids) for _, row in suppressed]
        places = _places([i for i, _ in suppressed], ids, vocab)
        flat.index_fill_(0, torch.from_numpy(places).to(flat.device), float("-inf"))
    return flat.view_as(logits)


def _add_bias(flat: torch.Tensor, vocab: int, rows: Sequence[tuple[int, ActiveRow]]) -> None:
    maps = [row.sequence.new.sampling.logit_bias for _, row in rows]
    ids = [np.fromiter(bias.keys(), dtype=np.int64) for bias in maps]
    addends = np.concatenate([np.fromiter(bias.values(), dtype=np.float32) for bias in maps])
    places = torch.from_numpy(_places([i for i, _ in rows], ids, vocab)).to(flat.device)
    flat.index_add_(0, places, torch.from_numpy(addends).to(flat.device))


def _penalize(flat: torch.Tensor, vocab: int, rows: Sequence[tuple[int, ActiveRow]]) -> None:
    """Repetition: Keskar et al. 2019, arXiv:1909.05858; then frequency and presence."""
    histories = [row.sequence.history for _, row in rows]
    ids = [history.token_ids for history in histories if history is not None]
    counts = np.concatenate([h.output_counts for h in histories if h is not None])
    lens = [len(i) for i in ids]
    sampling = [row.sequence.new.sampling for _, row in rows]
    per_row = np.array(
        [(s.repetition_penalty, s.frequency_penalty, s.presence_penalty) for s in sampling],
        dtype=np.float32,
    )
    table = np.concatenate((np.repeat(per_row, lens, axis=0), counts[:, None]), axis=1)
    columns = torch.from_numpy(np.ascontiguousarray(table.T)).to(flat.device)
    repetition, frequency, presence, count = columns
    places = torch.from_numpy(_places([i for i, _ in rows], ids, vocab)).to(flat.device)
    values = flat[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * count - presence * (count > 0)
    flat[places] = values


def _places(
    rows: Sequence[int], ids: Sequence[npt.NDArray[np.int64]], vocab: int
) -> npt.NDArray[np.int64]:
    """row * vocab + id, concatenated."""
    return np.concatenate([row * vocab + of_row for row, of_row in zip(rows, ids, strict=True)])
