"""The sampler against a plain reference of one row at a time, and its independence of the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from infermesh.errors import NumericalError
from services.shard import torch_sampler, truncation
from services.shard.domain import Sampling
from services.shard.noise import Purpose, uniforms
from services.shard.sampler import sample
from services.shard.slots import ActiveRow
from tests.randomised import drawn
from tests.unit.shard.rows import active_row
from tests.unit.shard.sampled_rows import VOCAB, random_rows


def _reference(logits: np.ndarray, row: ActiveRow) -> int:
    """sampling.proto's order, one row, in float64."""
    s, new = row.sequence.new.sampling, row.sequence.new
    x = logits.astype(np.float64).copy()
    for token, bias in s.logit_bias.items():
        x[token] += bias
    history = row.sequence.history
    if history is not None:
        for token, count in zip(
            history.token_ids.tolist(), history.output_counts.tolist(), strict=True
        ):
            x[token] = (
                x[token] / s.repetition_penalty
                if x[token] > 0
                else (x[token] * s.repetition_penalty)
            )
            x[token] -= s.frequency_penalty * count + s.presence_penalty * (count > 0)
    if row.num_output_tokens < new.min_tokens:
        x[list(new.suppressed_token_ids)] = -math.inf
    if s.greedy:
        return int(x.argmax())
    p = np.exp((x - x.max()) / s.temperature)
    if s.top_k:
        p[p < np.sort(p)[-min(s.top_k, len(p))]] = 0
    if s.top_p < 1:
        order = np.argsort(-p, kind="stable")
        sums = np.cumsum(p[order])
        last = int(np.searchsorted(sums, s.top_p * sums[-1]))
        p[p < p[order[min(last, len(p) - 1)]]] = 0
    if s.min_p:
        p[p < s.min_p * p.max()] = 0
    noise = uniforms([s.seed or 0], [new.choice], [row.context_len], Purpose.SAMPLE)[0]
    sums = np.cumsum(p)
    return int(np.searchsorted(sums, noise * sums[-1], side="right"))


@drawn(40, 150, rows=st.lists(random_rows(), min_size=1, max_size=8), seed=st.integers(0, 2**16))
def test_sample_equals_the_reference_when_features_are_combined(
    rows: list[ActiveRow], seed: int
) -> None:
    # 64 candidates: the way past them is taken too.
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncation, "_CANDIDATES", 64)
        got = [draw.token_id for draw in sample(logits, rows)]
    wanted = [_reference(logits[i].numpy(), row) for i, row in enumerate(rows)]
    assert got == wanted


@drawn(20, 60, rows=st.lists(random_rows(), min_size=2, max_size=9), seed=st.integers(0, 2**16))
def test_sample_gives_a_row_the_same_token_when_the_batch_differs(
    rows: list[ActiveRow], seed: int
) -> None:
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    turned = sample(logits.flip(0), rows[::-1])[::-1]
    assert together == alone == turned


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(seed=0), range(6)),
        (Sampling(seed=0, top_k=2), (4, 5)),
        (Sampling(seed=0, top_p=0.5), (4, 5)),
        (Sampling(seed=0, min_p=0.5), (4, 5)),
        (Sampling(seed=0, temperature=0.5), range(6)),
    ],
)
def test_sample_draws_by_probability_when_positions_run(
    sampling: Sampling, allowed: tuple[int, ...]
) -> None:
    weights = torch.tensor([0.05, 0.08, 0.1, 0.12, 0.25, 0.4])
    n = 8000
    rows = [active_row(sampling, start=i) for i in range(n)]
    drawn = np.array([d.token_id for d in sample(weights.log().repeat(n, 1), rows)])
    p = weights.double().numpy() ** (1 / sampling.temperature)
    p = np.where(np.isin(np.arange(6), allowed), p, 0)
    expected = n * p / p.sum()
    counts = np.bincount(drawn, minlength=6)
    assert set(np.unique(drawn)) <= set(allowed)
    assert _chi_square(counts, expected) < _chi_square_bound(len(allowed) - 1)


def _chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    kept = expected > 0
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum())


def _chi_square_bound(degrees: int) -> float:
    """Exceeded once in a thousand seeds (Wilson and Hilferty 1931); here they are fixed."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.09 * math.sqrt(spread)) ** 3


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=5),
        Sampling(seed=5, temperature=1.6),
        Sampling(seed=5, top_k=300, top_p=0.9),
        Sampling(seed=5, top_p=0.97),
        Sampling(seed=5, min_p=0.01),
    ],
)
def test_sample_draws_by_probability_when_hundreds_of_tokens_are_likely(sampling: Sampling) -> None:
    n, vocab = 12_000, 500
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 1.2
    p = np.exp(logits.double().numpy() / sampling.temperature)
    p /= p.max()
    order = np.argsort(-p)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    if sampling.top_p < 1:
        sums = np.cumsum(p[order])
        p[order[int(np.searchsorted(sums, sampling.top_p * sums[-1])) + 1 :]] = 0
    p[p < sampling.min_p] = 0
    drawn = [
        draw.token_id
        for start in range(0, n, 4000)
        for draw in sample(
            logits.expand(4000, -1), [active_row(sampling, start=start + i) for i in range(4000)]
        )
    ]
    counts, expected = np.bincount(np.array(drawn), minlength=vocab), n * p / p.sum()
    assert counts[p == 0].sum() == 0
    rare = (p > 0) & (expected < 8)  # too few for the approximation: together
    counts = np.append(counts[~rare & (p > 0)], counts[rare].sum())
    expected = np.append(expected[~rare & (p > 0)], expected[rare].sum())
    assert len(expected) > 60
    assert _chi_square(counts, expected) < _chi_square_bound(len(expected) - 1)


@pytest.mark.parametrize("vocab", [1000, 40_000])
def test_sample_gives_the_same_bits_when_threads_and_groups_differ(
    vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(13, vocab, generator=torch.Generator().manual_seed(2)) * 2
    rows = [
        active_row(Sampling(seed=i, top_p=(1.0, 0.9)[i % 2], top_logprobs=20), start=i)
        for i in range(13)
    ]
    threads = torch.get_num_threads()
    found = []
    try:
        for count, at_once in ((1, 1 << 20), (2, 1 << 20), (3, 1 << 16), (5, 1)):
            torch.set_num_threads(count)
            monkeypatch.setattr(torch_sampler, "_AT_ONCE", at_once)
            found.append(sample(logits, rows))
    finally:
        torch.set_num_threads(threads)
    assert all(draws == found[0] for draws in found)


def test_sample_never_draws_a_token_when_its_weight_is_zero() -> None:
    logits = torch.full((500, 300), -math.inf)
    logits[:, 64::65] = 0.0
    rows = [active_row(Sampling(seed=3), start=i) for i in range(500)]
    assert {draw.token_id for draw in sample(logits.nan_to_num(neginf=-1e4), rows)} <= set(
        range(64, 300, 65)
    )


def test_sample_keeps_ties_when_they_share_the_last_place() -> None:
    rows = [active_row(Sampling(seed=1, top_k=2), start=i) for i in range(200)]
    logits = torch.tensor([1.0, 0.5, 0.5, -3.0]).repeat(200, 1)
    assert {draw.token_id for draw in sample(logits, rows)} == {0, 1, 2}


def test_sample_counts_all_ties_of_top_k_when_top_p_takes_a_part_of_them() -> None:
    # 1 and 1000 times e^-5 are kept: the first token alone is 13 % of them, less than top_p.
    rows = [active_row(Sampling(seed=1, top_k=2, top_p=0.5), start=i) for i in range(200)]
    logits = torch.full((200, 1200), -9.0)
    logits[:, :1001] = -5.0
    logits[:, 0] = 0.0
    drawn = {draw.token_id for draw in sample(logits, rows)}
    assert len(drawn) > 100
    assert max(token for token in drawn if token is not None) <= 1000


def test_sample_gives_raw_logprobs_when_logits_are_edited() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    wanted = torch.log_softmax(logits.double(), -1)
    rows = [
        active_row(Sampling(temperature=0.0, top_logprobs=2, logit_bias={7: 50.0})),
        active_row(Sampling(temperature=0.0)),
        active_row(Sampling(temperature=0.7, seed=1, top_logprobs=0)),
    ]
    biased, plain, none = sample(logits, rows)
    assert biased.token_id == 7
    assert biased.logprobs is not None
    assert biased.logprobs.logprob == pytest.approx(float(wanted[0, 7]), abs=1e-5)
    top = wanted[0].topk(2)
    assert biased.logprobs.top_token_ids == top.indices.tolist()
    assert biased.logprobs.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-5)
    assert plain.logprobs is None
    assert none.logprobs is not None
    assert none.token_id is not None
    assert none.logprobs.logprob == pytest.approx(float(wanted[2, none.token_id]), abs=1e-5)
    assert none.logprobs.top_token_ids == []


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_sample_fails_one_row_alone_when_its_logits_are_not_finite(poison: float) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    rows = [active_row(Sampling(seed=i, top_p=0.9, top_logprobs=1)) for i in range(3)]
    untouched = sample(logits, rows)
    logits[1, 5] = poison
    poisoned = sample(logits, rows)
    assert isinstance(poisoned[1].error, NumericalError)
    assert poisoned[1].token_id is None
    assert [poisoned[0], poisoned[2]] == [untouched[0], untouched[2]]


def test_sample_lifts_the_suppression_when_min_tokens_are_reached() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 9] = 5.0
    rows = [
        active_row(
            Sampling(temperature=0.0),
            start=10 + n - 1,
            prompt_len=10,
            min_tokens=3,
            suppressed=[9],
        )
        for n in (2, 3)
    ]
    assert [draw.token_id == 9 for draw in sample(logits, rows)] == [False, True]
