"""From logits to tokens: what is asked of each row, who computes it, and what goes back.

The draw is an inverse CDF over the vocabulary in its own order, with one uniform per row: a row's
token depends on its own logits and noise, never on who shares the batch, and a tiny difference in
the logits moves it only where the uniform lies on an edge. What is cut off has probability zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from infermesh.errors import NumericalError
from services.shard import torch_sampler
from services.shard.domain import Logprobs
from services.shard.engine import Draw
from services.shard.kernels.sampling import SamplingKernel
from services.shard.row_plan import plan_rows
from services.shard.slots import ActiveRow


def sample(
    logits: torch.Tensor, rows: Sequence[ActiveRow], kernel: SamplingKernel | None = None
) -> list[Draw]:
    """One draw per row; a row with NaN or infinite logits fails alone.

    Args:
        logits: [rows, vocab_size], of any float type.
        kernel: for logits on a CPU; torch does it without one.
    """
    by = torch_sampler if kernel is None else kernel
    sampled = by.sample(logits, plan_rows(rows, logits.shape[1]))
    logprobs = sampled.logprobs()
    return [
        _draw(row, token, ok, next(logprobs) if _asks(row) else None)
        for row, token, ok in zip(
            rows, sampled.tokens.tolist(), sampled.finite.tolist(), strict=True
        )
    ]


def _asks(row: ActiveRow) -> bool:
    return row.sequence.new.sampling.top_logprobs is not None


def _draw(row: ActiveRow, token: int, finite: bool, logprobs: Logprobs | None) -> Draw:
    if not finite:
        return Draw(error=NumericalError("the model gave NaN or infinite logits for this sequence"))
    if logprobs is None:
        return Draw(token_id=token)
    k = row.sequence.new.sampling.top_logprobs or 0
    top = logprobs.top_token_ids[:k], logprobs.top_logprobs[:k]
    return Draw(token_id=token, logprobs=Logprobs(logprobs.logprob, *top))
