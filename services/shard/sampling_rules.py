"""Which sampling parameters a sequence may have: checked once, when it takes its slot.

The gateway has refused bad input long before; this keeps a wrong value from reaching the batch.
"""

from __future__ import annotations

from infermesh.errors import InvalidRequest
from services.shard.domain import NewSequence

MAX_TOP_LOGPROBS = 20

# field -> (lowest, highest)
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.0, 10.0),
}
_ABOVE_ZERO = ("top_p", "repetition_penalty")


def sampling_fault(new: NewSequence, vocab_size: int) -> InvalidRequest | None:
    """What is wrong with the sequence's sampling; None where it can be served."""
    sampling = new.sampling
    for name, (low, high) in _RANGES.items():
        value = getattr(sampling, name)
        inside = low < value <= high if name in _ABOVE_ZERO else low <= value <= high
        if not inside:  # also true of NaN
            return InvalidRequest(f"{name} is {value}, allowed are {low} to {high}", param=name)
    if sampling.top_k < 0:
        return InvalidRequest(f"top_k is {sampling.top_k}, allowed are 0 and above", param="top_k")
    if sampling.top_logprobs is not None and not 0 <= sampling.top_logprobs <= MAX_TOP_LOGPROBS:
        return InvalidRequest(
            f"top_logprobs is {sampling.top_logprobs}, allowed are 0 to {MAX_TOP_LOGPROBS}",
            param="top_logprobs",
        )
    if sampling.seed is None and not sampling.greedy:
        return InvalidRequest("seed is missing on a sampled sequence", param="seed")
    for param, ids in (
        ("logit_bias", sampling.logit_bias),
        ("suppressed_token_ids", new.suppressed_token_ids),
        ("penalty_token_ids", new.penalty_token_ids),
    ):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            return InvalidRequest(
                f"{param} has a token id outside the vocabulary of {vocab_size}", param=param
            )
    if any(not -100.0 <= bias <= 100.0 for bias in sampling.logit_bias.values()):
        return InvalidRequest("logit_bias has a value outside -100 to 100", param="logit_bias")
    return None
