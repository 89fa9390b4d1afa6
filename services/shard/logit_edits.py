"""What is done to logits before a token is chosen: bias, penalties, suppressed tokens, in that
order. In place and sparse: only the tokens concerned are touched, for all rows at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from services.shard.row_plan import Ids, RowPlan


@contextmanager
def edited(logits: torch.Tensor, plan: RowPlan) -> Iterator[None]:
    """The logits are edited within, and as they were behind.

    Args:
        logits: [rows, vocab_size] float32, contiguous.
    """
    if not plan.edits:
        yield
        return
    flat, vocab = logits.view(-1), logits.shape[1]
    table = plan.table
    bias = _places(plan.bias_ids, table["bias_end"], vocab, flat.device)
    history = _places(plan.history_ids, table["history_end"], vocab, flat.device)
    suppressed = _places(plan.suppressed_ids, table["suppressed_end"], vocab, flat.device)
    touched = torch.cat([bias, history, suppressed])
    before = flat[touched]
    if len(bias):
        flat.index_add_(0, bias, torch.from_numpy(plan.bias).to(flat.device))
    if len(history):
        _penalize(flat, history, plan)
    flat.index_fill_(0, suppressed, float("-inf"))
    yield
    flat[touched] = before


def _penalize(flat: torch.Tensor, places: torch.Tensor, plan: RowPlan) -> None:
    """Repetition: Keskar et al. 2019, arXiv:1909.05858; then frequency and presence."""
    lens = np.diff(plan.table["history_end"], prepend=0)
    names = ("repetition", "frequency", "presence")
    per_token = [np.repeat(plan.table[name], lens) for name in names]
    columns = torch.from_numpy(np.array((*per_token, plan.output_counts))).to(flat.device)
    repetition, frequency, presence, count = columns
    values = flat[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    flat[places] = values - frequency * count - presence * (count > 0)


def _places(ids: Ids, ends: Ids, vocab: int, device: torch.device) -> torch.Tensor:
    """row * vocab + id."""
    rows = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0)) if len(ids) else ids
    return torch.from_numpy(rows * vocab + ids).to(device)
