"""paged_attention against a float64 oracle that looks at every pair of tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.shard import attention_plan
from services.shard.attention import paged_attention
from services.shard.attention_plan import FREE_PADDING_TOKENS, MAX_PADDING_RATIO, group_by_length
from tests.unit.shard.attention_oracle import paged_case

BLOCK = 4


def _run(rows, **case):  # type: ignore[no-untyped-def]
    made = paged_case(rows, block_size=BLOCK, **case)
    got = paged_attention(
        made.q,
        made.k_pool,
        made.v_pool,
        made.block_tables,
        made.query_lens,
        made.context_lens,
        **made.rules,
    )
    return got, made.wanted


_rows = st.lists(
    st.integers(1, 30).flatmap(
        lambda context: st.tuples(st.one_of(st.just(1), st.integers(1, context)), st.just(context))
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=120, deadline=None)
@given(
    rows=_rows,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([1, 5, 8, 10]),
    window=st.one_of(st.none(), st.integers(1, 20)),
    softcap=st.one_of(st.none(), st.floats(0.5, 20.0)),
    with_sinks=st.booleans(),
    score_limit=st.sampled_from([1, 200, 1 << 20]),
    seed=st.integers(0, 2**16),
)
def test_attention_equals_the_oracle_when_rows_are_mixed(
    rows, kv_heads, group, head_dim, window, softcap, with_sinks, score_limit, seed
):  # type: ignore[no-untyped-def]
    limits = attention_plan.Limits(
        gathered=200 if score_limit == 1 else 1 << 20, scores=score_limit
    )
    sinks = torch.linspace(-2, 2, kv_heads * group) if with_sinks else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_plan, "CPU_LIMITS", limits)
        got, wanted = _run(
            rows,
            kv_heads=kv_heads,
            group=group,
            head_dim=head_dim,
            seed=seed,
            scale=head_dim**-0.5,
            sliding_window=window,
            softcap=softcap,
            sinks=sinks,
        )
    # float32 sums of at most 30 terms of order 1
    torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-5)


def test_attention_accumulates_in_float32_when_the_pool_is_bfloat16() -> None:
    got, wanted = _run(
        [(1, 200), (7, 90), (1, 3)],
        kv_heads=2,
        group=2,
        head_dim=16,
        seed=3,
        dtype=torch.bfloat16,
        scale=0.25,
    )
    # Inputs are exact in both; only the output is rounded to 8 bits of mantissa.
    torch.testing.assert_close(got.double(), wanted, rtol=2**-8, atol=1e-3)


def test_attention_chunks_queries_when_a_prompt_is_long() -> None:
    # 16 queries at least per chunk: 90 queries make several chunks at this limit.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_plan, "CPU_LIMITS", attention_plan.Limits(1 << 20, 1))
        for window in (None, 1, 7, 40, 99, 100):
            got, wanted = _run(
                [(90, 100), (1, 64), (33, 33)],
                kv_heads=1,
                group=2,
                head_dim=4,
                seed=5,
                scale=0.5,
                sliding_window=window,
            )
            torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-5)


def test_attention_leaves_other_rows_alone_when_one_row_is_nan() -> None:
    rows = [(1, 9), (1, 30), (3, 11)]
    tables = np.arange(30).reshape(3, 10)
    generator = torch.Generator().manual_seed(1)
    k_pool, v_pool = (torch.randn(30, BLOCK, 1, 4, generator=generator) for _ in range(2))
    k_pool[10:20], v_pool[10:20] = math.nan, math.nan
    q = torch.randn(5, 2, 4, generator=generator)
    lens = np.array([n for n, _ in rows]), np.array([c for _, c in rows])
    out = paged_attention(q, k_pool, v_pool, tables, *lens, scale=0.5)
    assert out.isnan().any(-1).any(-1).tolist() == [False, True, False, False, False]


@given(
    lens=st.lists(st.integers(1, 3000), max_size=40),
    max_tokens=st.sampled_from([1, 500, 4000, 1 << 20]),
)
def test_group_by_length_bounds_padding_when_lengths_differ(
    lens: list[int], max_tokens: int
) -> None:
    lengths = np.array(lens, dtype=np.int64)
    groups = group_by_length(np.arange(len(lens)), lengths, max_tokens)
    assert sorted(row for group in groups for row in group.tolist()) == list(range(len(lens)))
    for group in groups:
        real, padded = int(lengths[group].sum()), int(lengths[group].max()) * len(group)
        assert padded - real <= max(FREE_PADDING_TOKENS, MAX_PADDING_RATIO * real)
        assert len(group) == 1 or padded <= max_tokens
