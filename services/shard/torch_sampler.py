"""Sampling in torch: on CUDA, and where there are no kernels. The same tokens as the kernel's on a
CPU, bit for bit; on CUDA weights may differ in their last digit, as exp2 does.

Rows are drawn some at a time, so that what is computed of them stays in a CPU's cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from services.shard import logit_edits
from services.shard.exact_weights import (
    BLOCK,
    LOG2_E,
    block_maxima,
    block_sums,
    exact_weights,
    exponents,
)
from services.shard.inverse_cdf import draw
from services.shard.row_plan import MOST_TOP, RowPlan, Table
from services.shard.sampled import Sampled
from services.shard.truncation import truncated

# Values per group of rows on a CPU.
_AT_ONCE = 1 << 20
# From so many values on, a CPU finds the largest sooner by blocks.
_MANY = 1 << 15


def sample(logits: torch.Tensor, plan: RowPlan) -> Sampled:
    """One token per row, in one transfer to the host.

    Args:
        logits: [rows, vocab_size], of any float type; edited meanwhile where it is float32.
    """
    raw = logits.float().contiguous()
    # A sum is finite where all terms are: one pass instead of a mask over the vocabulary.
    finite = torch.isfinite(raw.sum(dim=-1))
    with logit_edits.edited(raw, plan):
        tokens = _first_of_largest(raw)
        for rows, cut in _groups(plan.table, raw):
            index = torch.from_numpy(rows).to(raw.device)
            neighbours = rows[-1] - rows[0] == len(rows) - 1  # then nothing is copied
            of_rows = raw[rows[0] : rows[-1] + 1] if neighbours else raw.index_select(0, index)
            drawn = _draw(of_rows, tokens[index], plan.table[rows], cut)
            tokens.index_copy_(0, index, drawn)
    asking = np.flatnonzero(plan.table["described"])
    # float64 holds every token id, so that ids, flags and logprobs travel together.
    found = [tokens.double(), finite.double()]
    if len(asking):
        index = torch.from_numpy(asking).to(raw.device)
        found.append(_describe(raw.index_select(0, index), tokens[index]).view(-1))
    host = torch.cat(found).cpu().numpy()
    n = len(tokens)
    described = host[2 * n :].reshape(len(asking), -1) if len(asking) else None
    return Sampled(host[:n].astype(np.int64), host[n : 2 * n] != 0, described)


def _groups(table: Table, raw: torch.Tensor) -> Iterator[tuple[npt.NDArray[np.int64], bool]]:
    """Rows to be drawn together, and whether they are truncated."""
    drawn = table["scale"] > 0
    if not drawn.any():
        return
    cut = (table["top_k"] > 0) | (table["top_p"] < 1) | (table["least"] > -np.inf)
    size = max(1, _AT_ONCE // raw.shape[1]) if raw.device.type == "cpu" else len(table)
    for is_cut in (True, False):
        rows = np.flatnonzero(drawn & (cut == is_cut))
        for start in range(0, len(rows), size):
            yield rows[start : start + size], is_cut


def _draw(logits: torch.Tensor, likeliest: torch.Tensor, table: Table, cut: bool) -> torch.Tensor:
    columns = torch.from_numpy(np.array((table["noise"], table["scale"]))).to(logits.device)
    noise, scale = columns[:, :, None]
    largest = logits.gather(1, likeliest[:, None])
    of_tokens = exponents(logits, largest, scale.float())
    weights = exact_weights(of_tokens)
    if cut:
        weights = truncated(of_tokens, weights, table)
    drawn = draw(weights, noise).clamp_max(logits.shape[1] - 1)
    # Else all are suppressed, or a penalty is beyond all bounds: nothing to draw from.
    return torch.where(torch.isfinite(largest[:, 0]), drawn, likeliest)


def _first_of_largest(logits: torch.Tensor) -> torch.Tensor:
    """argmax, the first where several are largest; in large vocabularies it takes a CPU a fifth of
    the time of torch's own."""
    if logits.device.type != "cpu" or logits.numel() < _MANY:
        return logits.argmax(dim=-1)
    block = block_maxima(logits).argmax(dim=-1, keepdim=True)
    columns = block * BLOCK + torch.arange(BLOCK, device=logits.device)
    inside = logits.gather(1, columns.clamp_max(logits.shape[1] - 1))
    # The last token, repeated, comes after itself.
    return (block[:, 0] * BLOCK) + inside.argmax(dim=-1)


def _describe(raw: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[rows, 3 + 2 * top] float64: see `Sampled.described`."""
    largest = raw.amax(dim=-1, keepdim=True)
    totals = block_sums(exact_weights(exponents(raw, largest, torch.full_like(largest, LOG2_E))))
    top, ids = _top(raw)
    own = raw.gather(1, tokens[:, None])
    total = totals.sum(dim=-1, keepdim=True)
    return torch.cat([own.double(), largest.double(), total, ids.double(), top.double()], dim=1)


def _top(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, MOST_TOP] largest logits and their ids; among equal ones the lower id first."""
    vocab = raw.shape[1]
    blocks = _in_order(block_maxima(raw), MOST_TOP).sort(dim=-1).values
    columns = blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=raw.device)
    columns = columns.flatten(1)
    inside = raw.gather(1, columns.clamp_max(vocab - 1))
    inside = inside.masked_fill(columns >= vocab, float("-inf"))
    chosen = _in_order(inside, min(MOST_TOP, vocab))
    return inside.gather(1, chosen), columns.gather(1, chosen)


def _in_order(values: torch.Tensor, count: int) -> torch.Tensor:
    """[rows, count] places of the largest float32 values; among equal ones the lower first."""
    width = values.shape[1]
    bits = (values + 0.0).view(torch.int32)  # -0 is 0
    # As integers, floats of either sign are in their own order.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    places = torch.arange(width - 1, -1, -1, device=values.device)
    keys = ordered * (1 << 20) + places
    return width - 1 - keys.topk(min(count, width), dim=-1).values % (1 << 20)
