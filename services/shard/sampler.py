"""From logits to tokens, vectorised over rows: one transfer to the host per step.

The draw is an inverse CDF over the vocabulary in its own order, with one uniform per row: a row's
token depends on its own logits and noise, never on who shares the batch, and a tiny difference in
the logits moves it only where the uniform lies on an edge. What is cut off has probability zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from infermesh.errors import NumericalError
from services.shard import logit_edits
from services.shard.domain import Logprobs
from services.shard.engine import Draw
from services.shard.inverse_cdf import block_sums, draw
from services.shard.noise import Purpose, uniforms
from services.shard.slots import ActiveRow
from services.shard.truncation import cutoffs


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the device computed, before it is taken to the host."""

    tokens: torch.Tensor  # [n] int64
    finite: torch.Tensor  # [n] bool
    logprobs: torch.Tensor | None  # [m, 1 + 2 k] float64: own logprob, top ids, top logprobs


def sample(logits: torch.Tensor, rows: Sequence[ActiveRow]) -> list[Draw]:
    """One draw per row; a row with NaN or infinite logits fails alone.

    Args:
        logits: [rows, vocab_size], of any float type.
    """
    raw = logits.float()
    sampled = _sample(raw, rows)
    asking = [i for i, row in enumerate(rows) if row.sequence.new.sampling.top_logprobs is not None]
    # float64 holds every token id, so that ids, flags and logprobs travel together.
    host = torch.cat([sampled.tokens.double(), sampled.finite.double()])
    if sampled.logprobs is not None:
        host = torch.cat([host, sampled.logprobs.reshape(-1)])
    values = host.cpu().numpy()
    n = len(rows)
    logprobs = _read_logprobs(values[2 * n :], rows, asking)
    return [
        Draw(token_id=int(values[i]), logprobs=logprobs.get(i))
        if values[n + i]
        else Draw(error=NumericalError("the model gave NaN or infinite logits for this sequence"))
        for i in range(n)
    ]


def _sample(raw: torch.Tensor, rows: Sequence[ActiveRow]) -> Sampled:
    # A sum is finite where all terms are: one pass instead of a mask over the vocabulary.
    finite = torch.isfinite(raw.sum(dim=-1))
    edited = logit_edits.apply(raw, rows)
    drawn = [i for i, row in enumerate(rows) if not row.sequence.new.sampling.greedy]
    tokens = _draw(edited, rows) if len(drawn) == len(rows) else edited.argmax(dim=-1)
    if 0 < len(drawn) < len(rows):
        index = torch.tensor(drawn, device=raw.device)
        tokens.index_copy_(0, index, _draw(edited[index], [rows[i] for i in drawn]))
    return Sampled(tokens, finite, _logprobs(raw, tokens, rows))


def _draw(logits: torch.Tensor, rows: Sequence[ActiveRow]) -> torch.Tensor:
    """Inverse CDF per row."""
    sampling = [row.sequence.new.sampling for row in rows]
    noise = uniforms(
        [s.seed or 0 for s in sampling],
        [row.sequence.new.choice for row in rows],
        [row.context_len for row in rows],
        Purpose.SAMPLE,
    )
    columns = np.stack((noise, [s.temperature for s in sampling]), axis=1)
    noise_column, temperature = torch.from_numpy(columns).to(logits.device).T[:, :, None]
    # Relative to the maximum first: a temperature near zero must not overflow.
    scaled = logits - logits.amax(dim=-1, keepdim=True)
    scaled.div_(temperature.float().clamp_min(1e-6))
    weights = scaled.exp()
    if any(s.truncates for s in sampling):
        totals = block_sums(weights).sum(dim=-1, keepdim=True)
        weights.masked_fill_(scaled < cutoffs(scaled, totals, sampling), 0.0)
    return draw(weights, noise_column)


def _logprobs(
    raw: torch.Tensor, tokens: torch.Tensor, rows: Sequence[ActiveRow]
) -> torch.Tensor | None:
    """Of raw logits, for the rows that ask, all as wide as the widest of them."""
    asked = [row.sequence.new.sampling.top_logprobs for row in rows]
    asking = [i for i, k in enumerate(asked) if k is not None]
    if not asking:
        return None
    index = torch.tensor(asking, device=raw.device)
    logprobs = torch.log_softmax(raw[index], dim=-1)
    own = logprobs.gather(1, tokens[index][:, None])
    most = min(max(k for k in asked if k is not None), raw.shape[1])
    top = logprobs.topk(most, dim=-1)
    return torch.cat([own.double(), top.indices.double(), top.values.double()], dim=1)


def _read_logprobs(
    values: np.ndarray[tuple[int], np.dtype[np.float64]],
    rows: Sequence[ActiveRow],
    asking: Sequence[int],
) -> dict[int, Logprobs]:
    if not asking:
        return {}
    table = values.reshape(len(asking), -1)
    most = (table.shape[1] - 1) // 2
    found = {}
    for i, line in zip(asking, table, strict=True):
        k = min(rows[i].sequence.new.sampling.top_logprobs or 0, most)
        ids = [int(token) for token in line[1 : 1 + k]]
        found[i] = Logprobs(float(line[0]), ids, line[1 + most : 1 + most + k].tolist())
    return found
