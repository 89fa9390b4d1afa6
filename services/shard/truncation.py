"""top_k, top_p and min_p as one number per row: the logit below which a token is cut off.

Tokens equal to the last one kept are kept too, so that the outcome does not depend on the order in
which equal logits are sorted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.shard.domain import Sampling

# Sorting 150,000 logits on a CPU takes 10 ms a row; nearly always the answer is in the first few.
_CPU_CANDIDATES = 512


def cutoffs(scaled: torch.Tensor, sampling: Sequence[Sampling]) -> torch.Tensor:
    """[rows, 1] cutoffs, -inf where nothing is cut.

    Args:
        scaled: [rows, vocab_size] logits over temperature, the maximum of each row being 0.
    """
    vocab = scaled.shape[1]
    columns = torch.tensor(
        [(_k(s, vocab), s.top_p, s.min_p) for s in sampling], dtype=torch.float64
    ).to(scaled.device)
    top_k, top_p, min_p = columns.T[:, :, None]
    cutoff = torch.log(min_p).to(scaled.dtype)  # the maximum is 0; log(0) = -inf cuts nothing
    if any(_sorts(s) for s in sampling):
        cutoff = torch.maximum(cutoff, _sorted_cutoffs(scaled, top_k.long(), top_p, sampling))
    return cutoff


def _sorts(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0


def _k(sampling: Sampling, vocab: int) -> int:
    return min(sampling.top_k or vocab, vocab)


def _sorted_cutoffs(
    scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, sampling: Sequence[Sampling]
) -> torch.Tensor:
    rows, vocab = scaled.shape
    if scaled.device.type != "cpu" or vocab <= _CPU_CANDIDATES:
        return _cutoffs_among(scaled, vocab, top_k, top_p)[0]
    result = torch.full((rows, 1), float("-inf"), dtype=scaled.dtype)
    few = [i for i, s in enumerate(sampling) if _sorts(s)]
    cutoff, found = _cutoffs_among(scaled[few], _CPU_CANDIDATES, top_k[few], top_p[few])
    result[few] = cutoff
    # Decided by each row itself, so that its token does not depend on the others.
    rest = [i for i, ok in zip(few, found[:, 0].tolist(), strict=True) if not ok]
    if rest:
        result[rest] = _cutoffs_among(scaled[rest], vocab, top_k[rest], top_p[rest])[0]
    return result


def _cutoffs_among(
    scaled: torch.Tensor, num_candidates: int, top_k: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cutoffs found among the largest `num_candidates` logits, and whether that was enough."""
    vocab = scaled.shape[1]
    values = scaled.topk(num_candidates, dim=-1).values
    kth = values.gather(1, (top_k - 1).clamp_max(num_candidates - 1))
    kept = torch.where(values >= kth, values.double().exp(), 0.0)
    sums = kept.cumsum(dim=-1)
    limited = top_k < vocab
    # What top_p is a part of: the top_k tokens, or the whole vocabulary.
    whole = torch.where(limited, sums[:, -1:], scaled.double().exp().sum(dim=-1, keepdim=True))
    wanted = top_p * whole
    # The first place at which the sum reaches top_p is the last one kept.
    last = torch.searchsorted(sums, wanted).clamp_max(num_candidates - 1)
    nucleus = torch.where(top_p < 1.0, values.gather(1, last), float("-inf"))
    cutoff = torch.maximum(torch.where(limited, kth, float("-inf")), nucleus)
    k_inside = ~limited | (top_k < num_candidates) | (num_candidates == vocab)
    p_inside = (top_p >= 1.0) | (sums[:, -1:] >= wanted)
    return cutoff, (k_inside & p_inside) | (num_candidates == vocab)
