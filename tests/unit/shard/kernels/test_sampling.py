"""The sampling kernel gives what torch gives, bit for bit: tokens, and the logprobs, which hold the
sums of all weights. Torch is tested against a plain reference in test_sampler.py."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.shard import torch_sampler
from services.shard.domain import Sampling
from services.shard.kernels.library import Library
from services.shard.kernels.sampling import SamplingKernel
from services.shard.row_plan import plan_rows
from services.shard.sampler import sample
from services.shard.slots import ActiveRow
from tests.unit.shard.rows import active_row
from tests.unit.shard.sampled_rows import VOCAB, random_rows

LARGE = 20_011  # not a multiple of a block; more than the candidates of top_p
NUCLEI = (1e-6, 0.3, 0.9, 0.999, 0.9999999)


@pytest.fixture(scope="module")
def kernel(kernels: Library) -> SamplingKernel:
    return SamplingKernel(kernels)


def normal(rows: int, vocab: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def assert_equal(logits: torch.Tensor, rows: list[ActiveRow], kernel: SamplingKernel) -> None:
    untouched = logits.clone()
    by_torch, by_kernel = sample(logits, rows), sample(logits, rows, kernel)
    assert by_kernel == by_torch
    assert torch.equal(logits, untouched) or not torch.isfinite(untouched).all()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(random_rows(), min_size=1, max_size=8),
    seed=st.integers(0, 2**16),
    grid=st.sampled_from([0.0, 0.25, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_equals_torch_when_settings_are_combined(
    kernel: SamplingKernel, rows: list[ActiveRow], seed: int, grid: float, dtype: torch.dtype
) -> None:
    logits = normal(len(rows), VOCAB, seed)
    if grid:  # many ties
        logits = (logits / grid).round() * grid
    assert_equal(logits.to(dtype), rows, kernel)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 4.0, 1e3])
@pytest.mark.parametrize("temperature", [1e-6, 0.7, 1.0, 2.0])
def test_equals_torch_in_a_large_vocabulary(
    kernel: SamplingKernel, spread: float, temperature: float
) -> None:
    settings = [
        {"top_p": 1.0},
        *({"top_p": p} for p in NUCLEI),
        *({"top_k": k, "top_p": 0.9} for k in (1, 2, 300, 5000)),
        {"top_k": LARGE},
        {"min_p": 0.02},
        {"min_p": 1.0, "top_logprobs": 20},
        {"top_logprobs": 3, "logit_bias": {LARGE - 1: 9.0, 0: -100.0}},
    ]
    rows = [
        active_row(Sampling(temperature=temperature, seed=7 * i, **s), start=start)  # type: ignore[arg-type]
        for i, s in enumerate(settings)
        for start in (0, 1, 2)
    ]
    assert_equal(normal(len(rows), LARGE, seed=3, spread=spread), rows, kernel)


@pytest.mark.parametrize("vocab", [1, 19, 63, 64, 65, 128])
def test_equals_torch_in_vocabularies_about_as_wide_as_a_block(
    kernel: SamplingKernel, vocab: int
) -> None:
    rows = [
        active_row(Sampling(seed=i, top_p=0.8, top_k=i, top_logprobs=20), start=i) for i in range(9)
    ]
    assert_equal(normal(9, vocab, vocab), rows, kernel)


def test_a_row_is_the_same_whoever_shares_the_batch_and_however_many_threads(
    kernel: SamplingKernel,
) -> None:
    logits = normal(9, LARGE, seed=5)
    rows = [
        active_row(
            Sampling(temperature=i % 3, seed=i, top_p=(0.9, 1.0)[i % 2], top_logprobs=20), start=i
        )
        for i in range(9)
    ]
    alone = [sample(logits[i : i + 1], [row], kernel)[0] for i, row in enumerate(rows)]
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert sample(logits, rows, kernel) == alone
        assert sample(logits.flip(0), rows[::-1], kernel)[::-1] == alone


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 100, LARGE - 1])
def test_one_row_fails_alone_when_its_logits_are_no_numbers(
    kernel: SamplingKernel, poison: float, place: int
) -> None:
    logits = normal(3, LARGE, seed=0)
    rows = [active_row(Sampling(seed=i, top_p=0.9, top_k=40, top_logprobs=1)) for i in range(3)]
    untouched = sample(logits, rows, kernel)
    logits[1, place] = poison
    poisoned = sample(logits, rows, kernel)
    assert poisoned[1].error is not None
    assert poisoned[1].token_id is None
    assert [poisoned[0], poisoned[2]] == [untouched[0], untouched[2]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("allowed", [[], [17]])
def test_draws_what_is_left_when_nearly_all_is_suppressed(
    kernel: SamplingKernel, temperature: float, allowed: list[int]
) -> None:
    suppressed = [token for token in range(VOCAB) if token not in allowed]
    sampling = Sampling(temperature=temperature, seed=1, top_p=0.5, top_k=7)
    rows = [active_row(sampling, start=i, min_tokens=99, suppressed=suppressed) for i in range(9)]
    logits = normal(9, VOCAB, seed=1)
    assert_equal(logits, rows, kernel)
    assert {draw.token_id for draw in sample(logits, rows, kernel)} == {*(allowed or [0])}


def test_weights_are_torchs_when_every_exponent_is_tried(kernel: SamplingKernel) -> None:
    """The sum over 4096 neighbouring logits, all over the range in which weights are not 0."""
    ends = torch.linspace(-25.0, 0.0, 2_000 * 4096).view(-1, 4096)
    logits = torch.cat([ends, torch.zeros(len(ends), 1)], dim=1)  # the largest is 0 everywhere
    rows = [active_row(Sampling(temperature=0.0, top_logprobs=0)) for _ in range(len(logits))]
    assert_equal(logits, rows, kernel)


def test_says_so_when_there_is_no_memory_for_a_row(
    kernel: SamplingKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        out = (ctypes.c_double * 45).from_address(arguments[-2])  # type: ignore[arg-type]
        out[1] = -1.0

    monkeypatch.setattr(kernel, "_sample_rows", refuse)
    rows = [active_row(Sampling(seed=1))]
    with pytest.raises(MemoryError):
        kernel.sample(normal(1, VOCAB, 0), plan_rows(rows, VOCAB))


@pytest.fixture(params=["torch", "kernel"])
def way(request: pytest.FixtureRequest, kernel: SamplingKernel) -> Any:
    """Either, for edges that random settings don't meet."""
    return torch_sampler if request.param == "torch" else kernel


def test_the_uniform_decides_to_the_last_bit_when_it_lies_on_an_edge(way: Any) -> None:
    plan = plan_rows([active_row(Sampling(seed=1)) for _ in range(512)], 512)
    plan.table["noise"] = np.arange(512) / 512  # exactly where the next token begins
    logits = torch.zeros(512, 512)
    assert way.sample(logits, plan).tokens.tolist() == list(range(512))
    plan.table["noise"][1:] = np.nextafter(np.arange(1, 512) / 512, 0)
    assert way.sample(logits, plan).tokens.tolist() == [0, *range(511)]


@pytest.mark.parametrize("others", [2, 2048])  # among the candidates, and past them
def test_top_p_ends_at_the_token_that_reaches_it_exactly(way: Any, others: int) -> None:
    # With this temperature an exponent is a logit; the others have half of the weight together.
    sampling = Sampling(seed=1, temperature=math.log2(math.e), top_p=0.5)
    plan = plan_rows([active_row(sampling, start=i) for i in range(64)], LARGE)
    logits = torch.full((64, LARGE), -60.0)
    logits[:, :others] = -math.log2(others)
    logits[:, 9000] = 0.0
    assert set(way.sample(logits, plan).tokens.tolist()) == {9000}
    plan.table["top_p"] = np.nextafter(0.5, 1)
    assert len(set(way.sample(logits, plan).tokens.tolist())) > 1


def test_penalties_are_rounded_at_each_step(way: Any) -> None:
    rng = np.random.default_rng(0)
    values, frequencies = rng.normal(0, 5, 300).astype(np.float32), rng.uniform(0, 2, 300)
    counts = rng.integers(1, 30, 300)
    logits, rows = torch.full((600, VOCAB), -100.0), []
    for i, (value, count) in enumerate(zip(values, counts.tolist(), strict=True)):
        frequency = np.float32(frequencies[i])
        raised = value * np.float32(1.7) if value < 0 else value / np.float32(1.7)
        wanted = raised - frequency * np.float32(count) - np.float32(0.3)
        sampling = Sampling(
            temperature=0.0,
            repetition_penalty=1.7,
            frequency_penalty=float(frequency),
            presence_penalty=0.3,
        )
        # The penalized token equals another one, and the first of both is chosen.
        for row, penalized, plain in ((2 * i, 20, 90), (2 * i + 1, 90, 20)):
            logits[row, penalized], logits[row, plain] = float(value), float(wanted)
            rows.append(active_row(sampling, output=[penalized] * count, start=count))
    assert set(way.sample(logits, plan_rows(rows, VOCAB)).tokens.tolist()) == {20}
