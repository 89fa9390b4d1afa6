"""The law of step times is learnt from what steps took: also from noise, stalls and changes."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.step_cost import Law, StepCost, Work, num_pairs, work_of
from tests.unit.scheduler.stepped_device import straight, work

DECODES = Work(num_decodes=16, decode_context=16 * 200)
PROMPT = Work(num_known=512, known_pairs=num_pairs(0, 512))


def beside(num_known: int, first: int = 0) -> Work:
    """A chunk of a prompt beside the decodes."""
    pairs = num_pairs(first, first + num_known)
    return DECODES._replace(num_known=num_known, known_pairs=pairs)


def learnt(*steps: Work, times: float = 1.0) -> StepCost:
    cost = StepCost()
    for one in steps:
        cost.took(one, times * straight(one))
    return cost


def assert_knows(cost: StepCost, one: Work, times: float = 1.0, within: float = 0.02) -> None:
    assert cost.law.seconds(one) == pytest.approx(times * straight(one), rel=within)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=6))
def test_work_counts_the_keys_that_every_query_reads(rows: list[tuple[int, int]]) -> None:
    spans = [(first, first + count) for first, count in rows]
    assert work_of(spans) == work(spans)


def test_steps_alike_are_known_when_few_were_seen() -> None:
    cost = learnt(PROMPT, DECODES, DECODES)
    assert_knows(cost, PROMPT)
    assert_knows(cost, DECODES)


def test_step_with_both_is_foreseen_when_each_was_seen_alone() -> None:
    cost = learnt(PROMPT, *[DECODES] * 20)
    assert_knows(cost, beside(200), within=0.1)


def test_what_attention_adds_is_known_when_a_long_prompt_was_seen() -> None:
    chunks = [beside(100, first) for first in range(0, 6000, 100)]
    cost = learnt(PROMPT, *[DECODES] * 20, *chunks)
    assert_knows(cost, beside(100, 8000))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_no_coefficient_is_negative_whatever_is_measured(seed: int) -> None:
    draw = random.Random(seed)
    cost = StepCost()
    for _ in range(60):
        known, decodes = draw.choice([(0, 3), (40, 0), (40, 3), (500, 16)])
        one = Work(known, known * draw.randrange(1, 4000), decodes, decodes * draw.randrange(4000))
        cost.took(one, draw.choice([1e-6, 0.001, 0.005, 0.1, 40.0]))
        assert min(cost.law) >= 0
        assert math.isfinite(cost.law.seconds(one))


def test_stall_hardly_counts_when_it_is_alone() -> None:
    cost = learnt(PROMPT, *[DECODES] * 20, *[beside(100)] * 20)
    for one in (DECODES, beside(100)):
        cost.took(one, 100 * straight(one))
        assert_knows(cost, one, within=0.05)
    cost.took(DECODES, straight(DECODES))
    assert_knows(cost, beside(100), within=0.05)


@pytest.mark.parametrize("times", [0.4, 2.5])
def test_change_of_pace_is_known_of_all_steps_after_three_of_one_kind(times: float) -> None:
    cost = learnt(PROMPT, *[DECODES] * 20, *[beside(100)] * 20)
    for _ in range(3):
        cost.took(DECODES, times * straight(DECODES))
    for one in (DECODES, PROMPT, beside(100)):
        assert_knows(cost, one, times, within=0.1)


def test_change_of_one_price_is_known_after_some_steps() -> None:
    cost = learnt(PROMPT, *[DECODES] * 20, *[beside(100)] * 20)
    for number in range(40):
        one = beside(50 + number)
        cost.took(one, straight(one) + 60e-6 * one.num_known)  # four times as much per token
    one = beside(90)
    expected = straight(one) + 60e-6 * 90
    assert cost.law.seconds(one) == pytest.approx(expected, rel=0.05)
    for _ in range(10):
        cost.took(DECODES, straight(DECODES))
    assert_knows(cost, DECODES, within=0.05)


def test_price_of_prompts_is_remembered_when_none_came_for_long() -> None:
    cost = learnt(PROMPT, *[DECODES] * 20, *[beside(100)] * 20, *[DECODES] * 20_000)
    assert_knows(cost, beside(200))


def test_usual_error_is_that_of_the_noise() -> None:
    draw = random.Random(5)
    cost = StepCost()
    for number in range(400):
        one = (DECODES, beside(80 + number % 40))[number % 2]
        cost.took(one, straight(one) * draw.lognormvariate(0, 0.05))
    assert 0.02 < cost.error < 0.08  # the mean of |noise| is 0.04


@given(st.floats(0, 1e-3), st.floats(0, 1e-6), st.floats(0, 1.0), st.integers(0, 20_000))
def test_known_within_is_the_inverse_of_known_seconds(
    per_known: float, per_pair: float, seconds: float, first: int
) -> None:
    law = Law(per_known=per_known, per_pair=per_pair)
    count = law.known_within(seconds, first)
    if count < 1e9:
        whole = int(count)
        assert law.known_seconds(first, whole) <= seconds * (1 + 1e-9) + 1e-12
        assert law.known_seconds(first, whole + 1) >= seconds * (1 - 1e-9) - 1e-12
