"""A device whose steps follow a law of their own, with a window of two steps in flight."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

from services.scheduler.step_cost import Work
from services.scheduler.token_budget import TokenBudget

BLOCK_SIZE = 16
MOST = 512
Row = tuple[int, int]


def straight(work: Work) -> float:
    """Seconds, in proportion to all that a step holds."""
    return (
        4e-3
        + 20e-6 * work.num_known
        + 1e-9 * work.known_pairs
        + 40e-6 * work.num_decodes
        + 0.02e-6 * work.decode_context
    )


def bent(work: Work) -> float:
    """Seconds where weights are read anyway, and so many query tokens are computed meanwhile."""
    return max(4e-3, 20e-6 * (work.num_known + work.num_decodes)) + 0.02e-6 * work.decode_context


class Device:
    """Streams that decode and a prompt now and then, as a plan would run them.

    Args:
        law: seconds of a step.
        target_s: of the budget that it runs under.
        noise: of the logarithm of a step's time.
        stalls: the share of steps that take thirty times as long as they should.
    """

    def __init__(
        self,
        law: Callable[[Work], float],
        target_s: float,
        *,
        noise: float = 0.0,
        stalls: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.law = law
        self.budget = TokenBudget(target_s, BLOCK_SIZE)
        self.contexts = [100] * 16
        self._noise, self._stalls = noise, stalls
        self._draw = random.Random(seed)
        self._in_flight: deque[tuple[list[Row], float]] = deque()

    def decode(self, num_steps: int) -> None:
        """The streams alone."""
        for _ in range(num_steps):
            self._run([])

    def prompt(self, length: int, streams: bool = True) -> list[tuple[int, float]]:
        """A prompt beside the streams, or alone: per step, its tokens and the law's seconds."""
        first, steps = 0, []
        while first < length:
            count = min(length - first, MOST)
            if streams:
                time = self.budget.target().beside(len(self.contexts), sum(self.contexts))
                count = min(count, MOST - len(self.contexts), time.tokens_from(first))
            steps.append((count, self._run([(first, first + count)], streams)))
            first += count
        return steps

    def _run(self, prompts: list[Row], streams: bool = True) -> float:
        """One step; what it took is told when the next one has been sent."""
        rows = list(prompts)
        if streams:
            rows += [(context, context + 1) for context in self.contexts]
            self.contexts = [context + 1 for context in self.contexts]
        seconds = self.law(work(rows))
        measured = seconds * self._draw.lognormvariate(0, self._noise)
        if self._draw.random() < self._stalls:
            measured *= 30
        self._in_flight.append((rows, measured))
        if len(self._in_flight) == 2:
            self.budget.took(*self._in_flight.popleft())
        return seconds


def work(rows: list[Row]) -> Work:
    """What rows from a position to before another are, counted key by key."""
    known = [row for row in rows if row[1] - row[0] > 1]
    decodes = [row for row in rows if row[1] - row[0] == 1]
    return Work(
        sum(end - first for first, end in known),
        sum(position + 1 for first, end in known for position in range(first, end)),
        len(decodes),
        sum(end for _, end in decodes),
    )
