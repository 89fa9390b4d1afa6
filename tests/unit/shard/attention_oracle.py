"""Random rows over shuffled blocks, and what attention must give for them, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class PagedCase:
    """Arguments of paged attention, and the result [num_tokens, num_heads, head_dim]."""

    q: torch.Tensor
    k_pool: torch.Tensor
    v_pool: torch.Tensor
    block_tables: npt.NDArray[np.int64]
    query_lens: npt.NDArray[np.int64]
    context_lens: npt.NDArray[np.int64]
    rules: dict[str, Any]
    wanted: torch.Tensor


def oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One row in float64, every pair of tokens: q [n, H, D], k and v [L, KVH, D]."""
    num_queries, heads, _ = q.shape
    context, group = len(k), heads // k.shape[1]
    k, v = (states.double().repeat_interleave(group, dim=1) for states in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    query_at = torch.arange(context - num_queries, context)[:, None]
    key_at = torch.arange(context)[None]
    hidden = key_at > query_at
    if sliding_window is not None:
        hidden |= key_at <= query_at - sliding_window
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(heads, num_queries, 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :context]
    return torch.einsum("hqk,khd->qhd", weights, v)


def paged_case(
    rows: list[tuple[int, int]],
    *,
    block_size: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    query_dtype: torch.dtype | None = None,
    **rules: Any,
) -> PagedCase:
    """Rows of (query_len, context_len); queries are of the pool's type unless they have another."""
    generator = torch.Generator().manual_seed(seed)
    blocks_of = [-(-context // block_size) for _, context in rows]
    num_blocks = sum(blocks_of) + 3
    order = torch.randperm(num_blocks, generator=generator).tolist()
    # What nobody wrote is NaN: reading it must not go unnoticed.
    k_pool = torch.full((num_blocks, block_size, kv_heads, head_dim), math.nan, dtype=dtype)
    v_pool = k_pool.clone()
    tables = np.zeros((len(rows), max(blocks_of) + 1), dtype=np.int64)
    q, wanted = [], []
    for r, (query_len, context) in enumerate(rows):
        tables[r, : blocks_of[r]] = [order.pop() for _ in range(blocks_of[r])]
        k, v = (
            torch.randn(context, kv_heads, head_dim, generator=generator).to(dtype)
            for _ in range(2)
        )
        positions = np.arange(context)
        slots = torch.from_numpy(
            tables[r, positions // block_size] * block_size + positions % block_size
        )
        k_pool.flatten(0, 1)[slots], v_pool.flatten(0, 1)[slots] = k, v
        queries = torch.randn(query_len, kv_heads * group, head_dim, generator=generator)
        queries = queries.to(query_dtype or dtype)
        q.append(queries)
        wanted.append(oracle(queries, k, v, **rules))
    lens = (np.array([n for n, _ in rows]), np.array([c for _, c in rows]))
    return PagedCase(torch.cat(q), k_pool, v_pool, tables, *lens, rules, torch.cat(wanted))
