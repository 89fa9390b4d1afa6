"""Paired comparison of two contestants that ran alternately: the ratio and how sure it is."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 10_000
# Of fewer pairs nothing is said: their interval would look better than it is.
MIN_PAIRS = 10


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of the paired ratios with its bootstrap 95 % interval (Efron 1979)."""

    median: float
    low: float
    high: float
    pairs: int = MIN_PAIRS

    def verdict(self, at_most: float) -> str:
        """Whether the ratio is at most a bar: met, missed, or undecided by this many pairs.

        Met where the interval's upper end lies within 5 % of the bar.
        """
        if self.pairs < MIN_PAIRS:
            return "undecided"
        if self.high <= at_most * 1.05:
            return "met"
        return "missed" if self.low > at_most * 1.05 else "undecided"

    def verdict_at_least(self, bar: float) -> str:
        """The same of a bar that the ratio has to reach, by the interval's lower end."""
        if self.pairs < MIN_PAIRS:
            return "undecided"
        if self.low >= bar * 0.95:
            return "met"
        return "missed" if self.high < bar * 0.95 else "undecided"


def paired_ratio(pairs: Sequence[tuple[float, float]], seed: int = 0) -> Ratio:
    """Of the first to the second of each pair."""
    ratios = [first / second for first, second in pairs]
    draw = random.Random(seed)
    medians = sorted(
        statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)
    )
    low, high = medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]
    figures = (round(value, 3) for value in (statistics.median(ratios), low, high))
    return Ratio(*figures, pairs=len(ratios))
