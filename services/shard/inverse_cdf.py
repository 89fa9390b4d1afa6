"""One draw per row: the token at which the running sum of weights passes a uniform's part of all.

Two levels, blocks and the tokens of one, as a running sum over 150,000 tokens costs ten times as
much. The sums are exact, so both levels and any other way give the same token.
"""

from __future__ import annotations

import torch

from services.shard.exact_weights import BLOCK, block_sums


def draw(weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """[rows] tokens; one of weight zero is never drawn.

    Args:
        weights: [rows, whole blocks] as `exact_weights` makes them, one above zero in each row.
        noise: [rows, 1] float64 uniforms in (0, 1).
    """
    ends = block_sums(weights).cumsum(dim=-1)
    wanted = noise * ends[:, -1:]
    # Only NaN can point past the end; such a row has failed already.
    block = torch.searchsorted(ends, wanted, right=True).clamp_max(ends.shape[1] - 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = weights.gather(1, block * BLOCK + torch.arange(BLOCK, device=weights.device))
    sums = inside.cumsum(dim=-1, dtype=torch.float64)
    offset = torch.searchsorted(sums, wanted - before, right=True).clamp_max(BLOCK - 1)
    return (block * BLOCK + offset)[:, 0]
