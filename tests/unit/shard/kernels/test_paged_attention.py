"""The compiled paged attention against a float64 oracle, and against itself, bit for bit."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from services.shard.attention import ScoreRules
from services.shard.batch import pack
from services.shard.domain import Sampling
from services.shard.forward import ATTENTION_NAME, ForwardPass, register
from services.shard.kernels.library import Library
from services.shard.kernels.paged import DTYPES, PagedAttention, PagedRows
from services.shard.kv_pool import KvPool, KvShape
from tests.randomised import drawn
from tests.unit.shard.attention_oracle import PagedCase, oracle, paged_case
from tests.unit.shard.rows import active_row

_SEGMENT, _KEYS = 512, 64  # as in attention.cpp and attention_tile.h

# Around a query tile, a block of keys, and a segment.
_contexts = st.one_of(
    st.integers(1, 150),
    st.sampled_from([_KEYS - 1, _KEYS, _KEYS + 1, _SEGMENT - 1, _SEGMENT, _SEGMENT + 1, 1100]),
)
_rows = st.lists(
    _contexts.flatmap(
        lambda context: st.tuples(
            st.one_of(st.just(1), st.integers(1, min(context, 90))), st.just(context)
        )
    ),
    min_size=1,
    max_size=5,
)


def _attend(kernels: Library, case: PagedCase, **changes: Any) -> torch.Tensor:
    rules = dict(case.rules)
    window = rules.pop("sliding_window", None)
    given = {name: getattr(case, name) for name in ("block_tables", "query_lens", "context_lens")}
    q = changes.pop("q", case.q)
    rows = PagedRows.of(**(given | changes))
    attention = PagedAttention(kernels, case.k_pool.dtype)
    return attention.attend(q, case.k_pool, case.v_pool, rows, ScoreRules(**rules), window)


@drawn(
    25,
    80,
    suppress=[HealthCheck.too_slow],
    rows=_rows,
    kv_heads=st.integers(1, 5),
    group=st.one_of(st.integers(1, 9), st.just(40)),
    head_dim=st.sampled_from([1, 5, 8, 24, 40, 64, 72, 80, 96, 128, 256]),
    block_size=st.sampled_from([4, 8, 16, 32]),
    window=st.one_of(st.none(), st.integers(1, 200), st.sampled_from([511, 512, 600, 4000])),
    softcap=st.one_of(st.none(), st.floats(0.5, 50.0)),
    with_sinks=st.booleans(),
    threads=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_attention_equals_the_oracle_when_rows_are_mixed(
    kernels: Library,
    rows: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
    threads: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    case = paged_case(
        rows,
        block_size=block_size,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        seed=seed,
        dtype=dtype,
        query_dtype=torch.float32,
        scale=head_dim**-0.5,
        sliding_window=window,
        softcap=softcap,
        sinks=torch.linspace(-2, 2, kv_heads * group) if with_sinks else None,
    )
    torch.set_num_threads(threads)
    got = _attend(kernels, case)
    # float32 sums of at most 1,100 weights, which together are 1, of values of order 1
    torch.testing.assert_close(got.double(), case.wanted, rtol=2e-5, atol=1e-5)
    pools = {"k_pool": case.k_pool.float(), "v_pool": case.v_pool.float()}
    assert torch.equal(got, _attend(kernels, dataclasses.replace(case, **pools)))


def test_bfloat16_queries_get_bfloat16_results(kernels: Library) -> None:
    case = paged_case(
        [(1, 700), (40, 90)],
        block_size=16,
        kv_heads=2,
        group=7,
        head_dim=64,
        seed=3,
        dtype=torch.bfloat16,
        scale=0.125,
    )
    wide = _attend(kernels, case, q=case.q.float())
    assert wide.dtype == torch.float32
    assert torch.equal(_attend(kernels, case), wide.bfloat16())


@settings(max_examples=25, deadline=None)
@given(
    context=_contexts,
    group=st.integers(1, 7),
    head_dim=st.sampled_from([5, 16, 40, 64, 128]),
    softcap=st.one_of(st.none(), st.floats(0.5, 50.0)),
    with_sinks=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_error_is_within_what_rounding_keys_and_values_can_make(
    kernels: Library,
    context: int,
    group: int,
    head_dim: int,
    softcap: float | None,
    with_sinks: bool,
    seed: int,
) -> None:
    """Rounding changes a number by 2^-8 of it at most: a score by e = 2^-8 scale |q|·|k|, which a
    cap makes no larger, a weight by a factor of exp(2e) for the largest e, and a value by 2^-8."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(n, heads, head_dim, generator=generator)
        for n, heads in ((min(context, 20), 2 * group), (context, 2), (context, 2))
    )
    rules: dict[str, Any] = {"scale": head_dim**-0.5, "softcap": softcap}
    rules["sinks"] = torch.linspace(-2, 2, 2 * group) if with_sinks else None
    blocks = -(-context // 16)
    table = torch.randperm(blocks, generator=generator)
    positions = torch.arange(context)
    slots = table[positions // 16] * 16 + positions % 16
    pools = [torch.full((blocks, 16, 2, head_dim), math.nan, dtype=torch.bfloat16) for _ in "kv"]
    attention = PagedAttention(kernels, torch.bfloat16)
    attention.write(pools[0], pools[1], slots, k, v)
    rows = PagedRows.of(table.numpy()[None], np.array([len(q)]), np.array([context]))
    got = attention.attend(q, pools[0], pools[1], rows, ScoreRules(**rules), None)
    unit = 2.0**-8
    sizes = torch.einsum("qhd,khd->qhk", q.abs(), k.abs().repeat_interleave(group, dim=1))
    factor = (2 * unit * rules["scale"] * sizes.amax(-1, keepdim=True).double()).exp()
    limit = (factor * (1 + unit) - 1) * oracle(q, k, v.abs(), **rules)
    assert bool(((got - oracle(q, k, v, **rules)).abs() <= limit + 1e-5).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 100, 700])
def test_bits_are_the_same_in_any_batch_chunk_and_number_of_threads(
    kernels: Library, window: int | None, dtype: torch.dtype
) -> None:
    case = paged_case(
        [(130, 1290), (64, 64), (1, 1), (5, 600)],
        block_size=16,
        kv_heads=2,
        group=7,
        head_dim=64,
        seed=11,
        dtype=dtype,
        query_dtype=torch.float32,
        scale=0.2,
        sliding_window=window,
        softcap=None if window else 30.0,
        sinks=torch.linspace(-1, 1, 14) if window else None,
    )
    torch.set_num_threads(1)
    together = _attend(kernels, case)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(_attend(kernels, case), together)
    start = 0
    for row, (num_queries, context) in enumerate(
        zip(case.query_lens.tolist(), case.context_lens.tolist(), strict=True)
    ):
        table = case.block_tables[[row]]
        for size in (1, 3, 17, num_queries):  # alone, in chunks; with size 1 as if decoded
            for done in range(0, num_queries, size):
                part = slice(start + done, start + min(done + size, num_queries))
                end = context - num_queries + done + (part.stop - part.start)
                alone = _attend(
                    kernels,
                    case,
                    q=case.q[part],
                    block_tables=table,
                    query_lens=np.array([part.stop - part.start]),
                    context_lens=np.array([end]),
                )
                assert torch.equal(alone, together[part])
        start += num_queries


def test_weights_are_exact_to_a_few_last_places_when_scores_lie_far_apart(kernels: Library) -> None:
    """One row per score x beside a score of 0: its weight is e^x / (1 + e^x)."""
    x = -torch.linspace(0, 87, 20_001)
    num_rows = len(x)
    k_pool = torch.stack((torch.zeros(num_rows), x), dim=1).view(num_rows, 2, 1, 1)
    v_pool = torch.tensor([0.0, 1.0]).repeat(num_rows).view(num_rows, 2, 1, 1)
    rows = PagedRows.of(np.arange(num_rows)[:, None], np.ones(num_rows), np.full(num_rows, 2))
    got = PagedAttention(kernels, torch.float32).attend(
        torch.ones(num_rows, 1, 1), k_pool, v_pool, rows, ScoreRules(scale=1.0), None
    )
    relative = (got.view(-1).double() / torch.sigmoid(x.double()) - 1).abs().max()
    assert relative < 4 * 2**-24  # e^x, the sum and the quotient are rounded


def test_other_rows_are_untouched_when_one_row_is_nan(kernels: Library) -> None:
    case = paged_case(
        [(1, 70), (1, 600), (3, 11)], block_size=8, kv_heads=1, group=2, head_dim=8, seed=1, scale=1
    )
    clean = _attend(kernels, case)
    poisoned = case.block_tables[1, 30]
    case.k_pool[poisoned, 5] = math.nan
    assert (_attend(kernels, case).isnan().any(-1).any(-1)).tolist() == [False, True] + [False] * 3
    case.k_pool[poisoned, 5] = 0.0
    case.v_pool[poisoned, 5] = math.nan
    got = _attend(kernels, case)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2, 3, 4]], clean[[0, 2, 3, 4]])


def test_a_head_with_strides_of_its_own_is_read_in_place(kernels: Library) -> None:
    case = paged_case(
        [(3, 40), (1, 9)], block_size=8, kv_heads=2, group=2, head_dim=16, seed=4, scale=0.25
    )
    wide = torch.randn(len(case.q), 7, 16)
    wide[:, 2:6] = case.q
    heads_first = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    uneven = torch.stack((case.q, case.q), dim=-1)[..., 0]
    wanted = _attend(kernels, case)
    for q in (wide[:, 2:6], heads_first, uneven):
        assert torch.equal(_attend(kernels, case, q=q), wanted)


@pytest.mark.parametrize(
    ("dtype", "tiled", "given", "used"),
    [
        (torch.float32, False, True, True),
        (torch.bfloat16, False, True, True),
        (torch.float16, False, True, False),
        (torch.float32, True, True, False),
        (torch.float32, False, False, False),
    ],
)
def test_forward_pass_uses_the_kernels_where_they_take_its_pool(
    kernels: Library,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tiled: bool,
    given: bool,
    used: bool,
) -> None:
    called: list[str] = []
    for name in ("attend", "write"):
        whole = getattr(PagedAttention, name)
        monkeypatch.setattr(
            PagedAttention,
            name,
            lambda *args, name=name, whole=whole: (called.append(name), whole(*args))[1],
        )
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation=ATTENTION_NAME,
        dtype=dtype,
    )
    register()
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype).eval()
    device = torch.device("cpu")
    pool = KvPool(KvShape(1, 2, 8, 4, dtype), 8, device)
    forward = ForwardPass(model, pool, 4, device, tiled=tiled, kernels=kernels if given else None)
    row = active_row(Sampling(), slot=0, start=0, token_ids=[3, 4, 5], block_ids=[0])
    with torch.inference_mode():
        forward.logits(pack([row], np.arange(8).reshape(1, 8), 4))
    assert called == (["write", "attend"] if used else [])


@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_are_written_where_the_slots_say(
    kernels: Library, dtype: torch.dtype, given: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(2)
    num_tokens, heads, head_dim = 9, 3, 20
    pools = [torch.zeros(6, 4, heads, head_dim, dtype=dtype) for _ in range(2)]
    wanted = [pool.clone() for pool in pools]
    slots = torch.randperm(24, generator=generator)[:num_tokens]
    # As the model has them: heads first, and values as a part of a wider product.
    key = torch.randn(heads, num_tokens, head_dim, generator=generator).to(given).transpose(0, 1)
    value = torch.randn(num_tokens, heads, 2 * head_dim, generator=generator).to(given)
    value = value[..., head_dim:]
    for pool, states in zip(wanted, (key, value), strict=True):
        pool.flatten(0, 1)[slots] = states.to(dtype)
    PagedAttention(kernels, dtype).write(pools[0], pools[1], slots, key, value)
    assert torch.equal(pools[0], wanted[0])
    assert torch.equal(pools[1], wanted[1])


def test_what_is_written_is_rounded_as_torch_rounds(kernels: Library) -> None:
    """Ties to even, a carry into the exponent, what overflows, what is too small, no number."""
    bits = torch.arange(-(2**31), 2**31, 65_521)  # a prime: all of a float's parts vary
    halfway = bits & ~0xFFFF | 0x8000
    floats = torch.cat((bits, halfway)).to(torch.int32).view(torch.float32)
    key = floats[: len(floats) // 40 * 40].view(-1, 2, 20)  # vectors and what is left of them
    pools = [torch.zeros(len(key), 1, 2, 20, dtype=torch.bfloat16) for _ in range(2)]
    slots = torch.arange(len(key))
    PagedAttention(kernels, torch.bfloat16).write(pools[0], pools[1], slots, key, -key)
    for pool, states in zip(pools, (key, -key), strict=True):
        wanted = states.bfloat16()
        got = pool.view(wanted.shape)
        assert torch.equal(got.isnan(), wanted.isnan())
        numbers = ~wanted.isnan()
        assert torch.equal(got[numbers].view(torch.int16), wanted[numbers].view(torch.int16))
