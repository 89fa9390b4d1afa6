"""top_k, top_p and min_p as one number per row: the exponent below which a token is cut off.

Tokens equal to the last one kept are kept too, so that the outcome does not depend on the order in
which equal logits are sorted. Sorted are the few largest alone, or one bin of a histogram.
"""

from __future__ import annotations

import numpy as np
import torch

from services.shard.exact_weights import BLOCK, SCALE_BITS, block_sums, exact_weights, kept_weights
from services.shard.row_plan import Table

# Nearly always what top_p keeps is among so many.
_CANDIDATES = 256
# Bins per unit of the exponent. Below -35 weights are 0, and top_p never goes there.
_FINENESS = 32
_NUM_BINS = (SCALE_BITS + 1) * _FINENESS


def truncated(exponents: torch.Tensor, weights: torch.Tensor, table: Table) -> torch.Tensor:
    """The weights, 0 where a token is cut off.

    Args:
        exponents: [rows, whole blocks], the maximum of each row being 0.
        weights: of those exponents.
        table: the rows' plan.
    """
    device = weights.device
    least = torch.from_numpy(table["least"].copy()).to(device)[:, None]
    limited = np.flatnonzero(table["top_k"])
    nuclei = np.flatnonzero(table["top_p"] < 1.0)
    cutoffs = torch.full_like(least, float("-inf"))
    if len(limited):
        index = torch.from_numpy(limited).to(device)
        top_k = torch.from_numpy(table["top_k"][limited].astype(np.int64)).to(device)
        values = _largest(_of(exponents, index), int(table["top_k"].max()))
        cutoffs[index] = values.gather(1, top_k[:, None] - 1)
    if len(nuclei):
        index = torch.from_numpy(nuclei).to(device)
        of_row, kept = _of(exponents, index), _of(weights, index)
        if table["top_k"][nuclei].any():  # then top_p is a part of what that keeps
            kept = kept_weights(of_row, kept, cutoffs[index])
        top_p = torch.from_numpy(table["top_p"][nuclei]).to(device)
        cutoffs[index] = torch.maximum(cutoffs[index], _nuclei(of_row, kept, top_p[:, None]))
    return kept_weights(exponents, weights, torch.maximum(least, cutoffs))


def _of(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return values if len(rows) == len(values) else values.index_select(0, rows)


def _largest(exponents: torch.Tensor, count: int) -> torch.Tensor:
    """[rows, count] values, largest first."""
    blocks = exponents.view(len(exponents), -1, BLOCK)
    count = min(count, exponents.shape[1])
    if 2 * count < blocks.shape[1]:
        # They are in the blocks whose largest values are largest.
        chosen = blocks.amax(dim=-1).topk(count, dim=-1).indices
        exponents = blocks.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    return exponents.topk(count, dim=-1).values


def _nuclei(exponents: torch.Tensor, kept: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """[rows, 1]: the largest exponent that has, with all above it, `top_p` of the kept weight."""
    wanted = top_p * block_sums(kept).sum(dim=-1, keepdim=True)
    values = _largest(exponents, _CANDIDATES)
    # Whatever is not kept comes after what is, and is never reached.
    sums = exact_weights(values).cumsum(dim=-1, dtype=torch.float64)
    last = torch.searchsorted(sums, wanted).clamp_max(values.shape[1] - 1)
    found = values.gather(1, last)
    missed = (sums[:, -1:] < wanted)[:, 0].nonzero()[:, 0]
    if len(missed):
        found[missed] = _nuclei_by_bins(exponents[missed], kept[missed], wanted[missed])
    return found


def _nuclei_by_bins(
    exponents: torch.Tensor, kept: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """The same, from the weight of each range of exponents and the order within one."""
    bins = (exponents * -_FINENESS).clamp_(max=_NUM_BINS - 1).long()
    mass = kept.new_zeros(len(kept), _NUM_BINS, dtype=torch.float64)
    mass.scatter_add_(1, bins, kept.double())
    upto = mass.cumsum(dim=-1)
    chosen = torch.searchsorted(upto, wanted).clamp_max(_NUM_BINS - 1)
    missing = wanted - (upto - mass).gather(1, chosen)
    found = torch.empty_like(wanted, dtype=exponents.dtype)
    for row in range(len(found)):
        inside = exponents[row][bins[row] == chosen[row]].sort(descending=True).values
        whole = torch.nn.functional.pad(inside, (0, -len(inside) % BLOCK), value=float("-inf"))
        sums = exact_weights(whole).cumsum(dim=-1, dtype=torch.float64)
        found[row] = whole[torch.searchsorted(sums, missing[row]).clamp_max(len(whole) - 1)]
    return found
