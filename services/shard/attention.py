"""Attention over the paged pool in plain torch: the reference that every faster kernel answers to.

No mask over all sequences, no repeated KV heads: the query heads that share a KV head are rows of
one product. Scores, softmax and sums are float32 whatever the pool's type.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.shard.attention_plan import AttentionLayout, DecodeBucket, PrefillRow, QueryChunk
from services.shard.scratch import Scratch

_F32 = torch.float32


@dataclass(frozen=True, slots=True)
class ScoreRules:
    """How raw scores become weights.

    Args:
        scale: multiplies query · key.
        softcap: c · tanh(score / c), as in Gemma 2.
        sinks: [num_heads] logits that take part in the softmax and have no value, as in gpt-oss.
    """

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def paged_attention(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    block_tables: npt.NDArray[np.int64],
    query_lens: npt.NDArray[np.int64],
    context_lens: npt.NDArray[np.int64],
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of packed rows over their blocks; returns [num_tokens, num_heads, head_dim].

    The rows' own K and V are in the pool already.

    Args:
        q: [num_tokens, num_heads, head_dim], rows one after another.
        k_pool, v_pool: [num_blocks, block_size, num_kv_heads, head_dim].
        block_tables: [rows, blocks]; entries past a row's context are not read.
        query_lens: query tokens of each row; the last of its context.
        context_lens: tokens of each sequence, its query tokens included.
        scale, softcap, sinks: see ScoreRules.
        sliding_window: a token sees itself and the sliding_window - 1 before it.
    """
    _, block_size, num_kv_heads, head_dim = k_pool.shape
    layout = AttentionLayout(
        block_tables,
        query_lens,
        context_lens,
        block_size,
        q.shape[1],
        num_kv_heads,
        head_dim,
        q.device,
    )
    rules = ScoreRules(scale, softcap, sinks)
    return attend(q, k_pool, v_pool, layout, rules, sliding_window, Scratch(q.device))


def attend(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    layout: AttentionLayout,
    rules: ScoreRules,
    sliding_window: int | None,
    scratch: Scratch,
) -> torch.Tensor:
    """`paged_attention` with the step's layout and working memory at hand."""
    plan = layout.plan(sliding_window)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for bucket in plan.decode:
        out[bucket.queries] = _decode(q, k_pool, v_pool, bucket, rules, scratch).to(q.dtype)
    for row in plan.prefill:
        _prefill(q, k_pool, v_pool, row, rules, scratch, out)
    return out


def _decode(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    bucket: DecodeBucket,
    rules: ScoreRules,
    scratch: Scratch,
) -> torch.Tensor:
    """[rows, num_heads, head_dim]; one batched product over rows and KV heads."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_pool.shape[2]
    group = num_heads // num_kv_heads
    batch = bucket.num_rows * num_kv_heads
    size = (batch, bucket.padded_len, head_dim)
    query = q[bucket.queries].reshape(batch, group, head_dim).to(_F32) * rules.scale
    keys = gather(k_pool.view(-1, head_dim), bucket.gather, scratch).view(size)
    scores = scratch.take("scores", (batch, group, bucket.padded_len), _F32)
    torch.bmm(query, keys.transpose(1, 2), out=scores)
    scores = scores.view(bucket.num_rows, num_kv_heads, group, bucket.padded_len)
    cap(scores, rules)
    if bucket.padding is not None:
        scores.masked_fill_(bucket.padding, float("-inf"))
    sinks = None if rules.sinks is None else rules.sinks.view(1, num_kv_heads, group, 1)
    weights = _softmax(scores, sinks).view(batch, group, bucket.padded_len)
    values = gather(v_pool.view(-1, head_dim), bucket.gather, scratch).view(size)
    return torch.bmm(weights, values).view(bucket.num_rows, num_heads, head_dim)


def _prefill(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    row: PrefillRow,
    rules: ScoreRules,
    scratch: Scratch,
    out: torch.Tensor,
) -> None:
    """Fills the row's part of `out`, a chunk of queries at a time."""
    head_dim, num_kv_heads = q.shape[2], k_pool.shape[2]
    width = num_kv_heads * head_dim
    size = (-1, num_kv_heads, head_dim)
    keys = gather(k_pool.view(-1, width), row.gather, scratch, "keys").view(size)
    values = gather(v_pool.view(-1, width), row.gather, scratch, "values").view(size)
    for chunk in row.chunks:
        part = slice(chunk.start, chunk.start + chunk.num_queries)
        seen = slice(chunk.key_start, chunk.key_end)
        out[part] = _chunk(q[part], keys[seen], values[seen], chunk, rules, scratch).to(q.dtype)


def _chunk(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    chunk: QueryChunk,
    rules: ScoreRules,
    scratch: Scratch,
) -> torch.Tensor:
    """[num_queries, num_heads, head_dim]; keys, values: [num_keys, num_kv_heads, head_dim]."""
    num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    query = q.view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    query = query.reshape(num_kv_heads, group * num_queries, head_dim).to(_F32) * rules.scale
    scores = scratch.take("scores", (num_kv_heads, group * num_queries, num_keys), _F32)
    torch.bmm(query, keys.permute(1, 2, 0), out=scores)
    scores = scores.view(num_kv_heads, group, num_queries, num_keys)
    cap(scores, rules)
    if chunk.future is not None:
        scores[..., num_keys - num_queries :].masked_fill_(chunk.future, float("-inf"))
    if chunk.past is not None:
        scores[..., : chunk.past.shape[1]].masked_fill_(chunk.past, float("-inf"))
    sinks = None if rules.sinks is None else rules.sinks.view(num_kv_heads, group, 1, 1)
    weights = _softmax(scores, sinks).view(num_kv_heads, group * num_queries, num_keys)
    mixed = torch.bmm(weights, values.transpose(0, 1))
    mixed = mixed.view(num_kv_heads, group, num_queries, head_dim).permute(2, 0, 1, 3)
    return mixed.reshape(num_queries, num_heads, head_dim)


def gather(
    pool: torch.Tensor, index: torch.Tensor, scratch: Scratch, name: str = "gathered"
) -> torch.Tensor:
    """Rows of the pool as float32, in scratch memory."""
    rows = scratch.take(name, (len(index), pool.shape[1]), pool.dtype)
    torch.index_select(pool, 0, index, out=rows)
    if pool.dtype == _F32:
        return rows
    return scratch.take(name, (len(index), pool.shape[1]), _F32).copy_(rows)


def cap(scores: torch.Tensor, rules: ScoreRules) -> None:
    if rules.softcap is not None:
        scores.div_(rules.softcap).tanh_().mul_(rules.softcap)


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Over the last dimension; a sink takes its share of the weight and gives nothing."""
    weights = torch.softmax(scores, dim=-1)
    if sinks is not None:
        total = torch.logsumexp(scores, dim=-1, keepdim=True)
        weights *= torch.sigmoid(total - sinks.to(_F32))
    return weights
