"""top_k, top_p and min_p as one number per row: the logit below which a token is cut off.

Tokens equal to the last one kept are kept too, so that the outcome does not depend on the order in
which equal logits are sorted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.shard.domain import Sampling

# Sorting 150,000 logits takes a CPU 5 ms a row; nearly always the answer is among the first few.
_CPU_CANDIDATES = (128, 4096)


def cutoffs(
    scaled: torch.Tensor, totals: torch.Tensor, sampling: Sequence[Sampling]
) -> torch.Tensor:
    """[rows, 1] cutoffs, -inf where nothing is cut.

    Args:
        scaled: [rows, vocab_size] logits over temperature, the maximum of each row being 0.
        totals: [rows, 1] float64 sums of exp(scaled).
    """
    vocab = scaled.shape[1]
    columns = torch.tensor(
        [(min(s.top_k or vocab, vocab), s.top_p, s.min_p) for s in sampling], dtype=torch.float64
    ).to(scaled.device)
    top_k, top_p, min_p = columns.T[:, :, None]
    result = torch.log(min_p).to(scaled.dtype)  # the maximum is 0; log(0) = -inf cuts nothing
    left = [i for i, s in enumerate(sampling) if s.top_k > 0 or s.top_p < 1.0]
    tiers = _CPU_CANDIDATES if scaled.device.type == "cpu" else ()
    for candidates in (*(tier for tier in tiers if tier < vocab), vocab):
        if not left:
            break
        rows = torch.tensor(left, device=scaled.device)
        cutoff, found = _among(
            scaled[rows], totals[rows], candidates, top_k[rows].long(), top_p[rows]
        )
        result[rows] = torch.maximum(result[rows], cutoff)
        if candidates == vocab:
            break
        # Each row decides for itself, so that its token does not depend on the others.
        left = [i for i, ok in zip(left, found[:, 0].tolist(), strict=True) if not ok]
    return result


def _among(
    scaled: torch.Tensor,
    totals: torch.Tensor,
    num_candidates: int,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cutoffs found among the largest `num_candidates` logits, and whether that was enough; where
    it was not, the cutoff is -inf."""
    limited = top_k < scaled.shape[1]
    values = scaled.topk(num_candidates, dim=-1).values
    kth = values.gather(1, (top_k - 1).clamp_max(num_candidates - 1))
    kept = torch.where(~limited | (values >= kth), values.double().exp(), 0.0)
    sums = kept.cumsum(dim=-1)
    # top_p is a part of the top_k tokens, or of the whole vocabulary.
    wanted = top_p * torch.where(limited, sums[:, -1:], totals)
    # The first place at which the sum reaches it is the last one kept.
    last = torch.searchsorted(sums, wanted).clamp_max(num_candidates - 1)
    nucleus = torch.where(top_p < 1.0, values.gather(1, last), float("-inf"))
    cutoff = torch.maximum(torch.where(limited, kth, float("-inf")), nucleus)
    k_found = ~limited | (top_k < num_candidates)
    p_found = (top_p >= 1.0) | (sums[:, -1:] >= wanted)
    found = (k_found & p_found) | (num_candidates == scaled.shape[1])
    return torch.where(found, cutoff, float("-inf")), found
