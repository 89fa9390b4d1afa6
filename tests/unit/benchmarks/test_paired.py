"""A bar is met, missed or undecided by where the interval of the ratio lies."""

import pytest

from benchmarks.paired import Ratio, paired_ratio


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.2, 1.3, "met"), (0.97, 1.2, "met"), (0.9, 1.2, "undecided"), (0.5, 0.9, "missed")],
)
def test_verdict_of_a_ratio_that_has_to_reach_a_bar(low: float, high: float, verdict: str) -> None:
    assert Ratio((low + high) / 2, low, high).verdict_at_least(1.0) == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.5, 0.9, "met"), (0.9, 1.04, "met"), (0.9, 1.2, "undecided"), (1.1, 1.3, "missed")],
)
def test_verdict_of_a_ratio_that_may_not_pass_a_bar(low: float, high: float, verdict: str) -> None:
    assert Ratio((low + high) / 2, low, high).verdict(1.0) == verdict


def test_nothing_is_decided_by_few_pairs() -> None:
    few, enough = (paired_ratio([(3.0, 2.0)] * count) for count in (9, 10))
    assert (few.verdict(2.0), few.verdict_at_least(1.0)) == ("undecided", "undecided")
    assert (enough.verdict(2.0), enough.verdict_at_least(1.0)) == ("met", "met")


def test_interval_holds_the_median_and_is_a_point_when_all_pairs_agree() -> None:
    assert paired_ratio([(3.0, 2.0)] * 10) == Ratio(1.5, 1.5, 1.5)
    spread = paired_ratio([(1.0, 1.0), (2.0, 1.0), (3.0, 1.0), (4.0, 1.0), (5.0, 1.0)])
    assert spread.low < spread.median == 3.0 < spread.high
