"""How many tokens of prompts a step may hold beside decodes, so that it ends within a target.

Pure: times come in. What a step costs is learnt in `step_cost.py`; who gets the tokens is decided
in `plan.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.scheduler.step_cost import Law, StepCost, Work, work_of

# The target is undercut by so many times the mean error, so that one step in twenty is late where
# errors are normal (1.6 of their standard deviation), and by no more than a factor: caution is time
# that prompts don't get.
_CAUTION, _MOST_CAUTION = 2.0, 0.25
# A step may hold so many times the known tokens that were seen in one lately.
_STRETCH = 1.5


@dataclass(frozen=True, slots=True)
class StepTarget:
    """The time that a step with decodes may take, and what is known of it.

    Attributes:
        aim_s: seconds that it should be expected to take at most.
        max_known: known tokens that it may hold though there be time for more.
        min_known: known tokens that it may hold though there be no time: prompts always move.
    """

    law: Law
    aim_s: float
    max_known: int
    min_known: int

    def beside(self, num_decodes: int, decode_context: int) -> TimeLeft:
        """What is left for known tokens in a step with these decodes."""
        decodes = Work(num_decodes=num_decodes, decode_context=decode_context)
        return TimeLeft(self, self.law.seconds(decodes))


class TimeLeft:
    """One step's time while a plan gives it away."""

    def __init__(self, target: StepTarget, decodes_s: float) -> None:
        self._target = target
        # How long the step is expected to take with what it holds so far.
        self.expected_s = decodes_s
        self._num_taken = 0
        # What the first sequence could have had.
        self._offered: int | None = None

    @property
    def offered(self) -> int:
        """The known tokens for which the step had time, by where its first ones stand."""
        return self.tokens_from(0) if self._offered is None else max(self._offered, self._num_taken)

    @property
    def is_spent(self) -> bool:
        """Prompts have had theirs, and what is left is no chunk."""
        return self._num_taken > 0 and self.tokens_from(0) < self._target.min_known

    def tokens_from(self, first: int) -> int:
        """The most known tokens, from position `first` of a sequence on, that may be added."""
        target = self._target
        fits = target.law.known_within(target.aim_s - self.expected_s, first)
        most = min(fits, target.max_known - self._num_taken)
        return max(target.min_known - self._num_taken, int(most))

    def take(self, first: int, count: int) -> None:
        """`count` known tokens from position `first` on are added."""
        if self._offered is None:
            self._offered = self.tokens_from(first)
        self._num_taken += count
        self.expected_s += self._target.law.known_seconds(first, count)


class TokenBudget:
    """What steps take, and what follows for the next.

    Args:
        target_s: how long a step with decodes may take.
        block_size: known tokens that such a step may hold in any case.
    """

    def __init__(self, target_s: float, block_size: int) -> None:
        self.target_s = target_s
        self._block_size = block_size
        self._cost = StepCost()

    def took(self, rows: Iterable[tuple[int, int]], seconds: float) -> None:
        """The device took so long for rows of query tokens at positions first to end - 1."""
        self._cost.took(work_of(rows), seconds)

    def target(self) -> StepTarget:
        """For the next plan."""
        cost = self._cost
        return StepTarget(
            cost.law,
            self.target_s / (1 + min(_MOST_CAUTION, _CAUTION * cost.error)),
            int(_STRETCH * cost.reach),
            self._block_size,
        )
