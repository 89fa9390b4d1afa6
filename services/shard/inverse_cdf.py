"""One draw per row from unnormalised probabilities: the token at which their running sum passes
a uniform's part of the total.

Two levels: sums of blocks in float32, their running sum and the one inside the block in float64.
A running sum over a vocabulary of 150,000 in float64 would cost ten times as much.
"""

from __future__ import annotations

import torch

_BLOCK = 64


def block_sums(weights: torch.Tensor) -> torch.Tensor:
    """[rows, blocks] sums over neighbouring tokens, as float64."""
    num_rows, vocab = weights.shape
    whole = vocab - vocab % _BLOCK
    sums = weights[:, :whole].reshape(num_rows, -1, _BLOCK).sum(dim=-1)
    if whole < vocab:
        sums = torch.cat([sums, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=1)
    return sums.double()


def draw(weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """[rows] tokens; one of weight zero is never drawn.

    Args:
        weights: [rows, vocab_size], at least one above zero in each row.
        noise: [rows, 1] float64 uniforms in (0, 1).
    """
    vocab = weights.shape[1]
    ends = block_sums(weights).cumsum(dim=-1)
    wanted = noise * ends[:, -1:]
    # Only NaN can point past the end; such a row has failed already.
    block = torch.searchsorted(ends, wanted, right=True).clamp_max(ends.shape[1] - 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp_min(0)), 0.0)
    columns = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, columns.clamp_max(vocab - 1)) * (columns < vocab)
    sums = inside.cumsum(dim=-1, dtype=torch.float64)
    # The block's sum in float32 may exceed the one in float64 by a rounding.
    rest = torch.minimum(wanted - before, sums[:, -1:] * (1 - 1e-12))
    offset = torch.searchsorted(sums, rest, right=True).clamp_max(_BLOCK - 1)
    return (block * _BLOCK + offset)[:, 0].clamp_max(vocab - 1)
