"""How long a step takes by what it holds: the law, and how it is learnt from steps that have run.

Pure: times come in. What a plan makes of it is `token_budget.py`'s.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

# It has known tokens, it has decodes.
Kind = tuple[bool, bool]
_PROMPTS_ALONE: Kind = (True, False)

# Evidence that a new step of the same kind leaves of the older: the last ten or so count.
_KEPT = 0.9
# The same where the law has changed.
_KEPT_OF_BEFORE = 0.1
# Passes over the coefficients per step; they go on from where they are.
_NUM_PASSES = 4
# Of so many steps of a kind none is a surprise.
_NUM_FIRST = 3
# A step is a surprise where it is so many times further off its expectation than is usual, but at
# least and at most by these logarithms of the ratio.
_SURPRISE_TIMES, _LEAST_SURPRISE, _MOST_SURPRISE = 5.0, 0.25, 0.5
# One or two in a row are a machine that was busy with something else. So many are a change.
_NUM_SURPRISES = 3
# Weight of the newest in the running mean of how far off expectations are.
_NEWEST = 1 / 16
_NUM_TERMS = 5


class Work(NamedTuple):
    """What a step holds, as far as its duration depends on it.

    Attributes:
        num_known, known_pairs: query tokens of prompts and of outputs computed again, and the keys
            that each of them reads, all together.
        num_decodes, decode_context: rows of one query token, and the keys that they read.
    """

    num_known: int = 0
    known_pairs: float = 0.0
    num_decodes: int = 0
    decode_context: int = 0


class Law(NamedTuple):
    """Seconds of a step: so many for each of what it holds, and for any step; never negative."""

    per_known: float = 0.0
    per_pair: float = 0.0
    fixed: float = 0.0
    per_decode: float = 0.0
    per_context: float = 0.0

    def seconds(self, work: Work) -> float:
        """How long a step with that in it takes."""
        return (
            self.fixed
            + self.per_known * work.num_known
            + self.per_pair * work.known_pairs
            + self.per_decode * work.num_decodes
            + self.per_context * work.decode_context
        )

    def known_seconds(self, first: int, count: int) -> float:
        """What `count` known tokens from position `first` on add to a step."""
        return self.per_known * count + self.per_pair * num_pairs(first, first + count)

    def known_within(self, seconds: float, first: int) -> float:
        """How many known tokens from position `first` on add that many seconds."""
        if seconds <= 0:
            return 0.0
        # n * per_known + (n * (first + 1/2) + n²/2) * per_pair = seconds, solved without
        # a difference of nearly equal numbers.
        linear = self.per_known + self.per_pair * (first + 0.5)
        divisor = linear + math.sqrt(linear * linear + 2 * self.per_pair * seconds)
        return 2 * seconds / divisor if divisor > 0 else math.inf


def num_pairs(first: int, end: int) -> float:
    """Keys that the queries at positions `first` to `end - 1` read: each its own and all before."""
    return (end * (end + 1) - first * (first + 1)) / 2


def work_of(rows: Iterable[tuple[int, int]]) -> Work:
    """Of rows with query tokens at positions `first` to `end - 1`."""
    num_known = num_decodes = decode_context = 0
    pairs = 0.0
    for first, end in rows:
        if end - first == 1:
            num_decodes += 1
            decode_context += end
        else:
            num_known += end - first
            pairs += num_pairs(first, end)
    return Work(num_known, pairs, num_decodes, decode_context)


class StepCost:
    """Learns the law: least squares of relative errors, without negative coefficients, over steps
    that count less the older they are.

    Steps with decodes, with prompts and with both are remembered apart, and each of them forgets
    only when its like comes: an hour without a prompt does not unlearn what a prompt costs. Only a
    step with both replaces evidence of prompts alone, too, because it was seen where plans are
    made; a law that is no straight line is thus met there.

    A lone step that takes far longer than expected (the machine stood still) hardly counts. Several
    in a row are a device that became slower as a whole, until more of them say it better.
    """

    def __init__(self) -> None:
        self.law = Law()
        # How far off expectations usually are: the mean of |ln(seconds / expected)|.
        self.error = 0.0
        # About the most known tokens of a step lately: far beyond it nothing is known.
        self.reach = 0.0
        # By what it holds: sums of x_i * x_j and, last in each row, x_i * seconds.
        self._evidence: dict[Kind, list[list[float]]] = {}
        self._num_seen: Counter[Kind] = Counter()
        # ln(seconds / expected) of the last steps, where all were surprises to the same side.
        self._surprises: list[float] = []

    def took(self, work: Work, seconds: float) -> None:
        """A step with that in it took so long."""
        kind = (work.num_known > 0, work.num_decodes > 0)
        expected = self.law.seconds(work) if self._num_seen[kind] >= _NUM_FIRST else 0.0
        self._num_seen[kind] += 1
        if expected > 0:
            seconds = self._judge(expected, seconds)
        if all(kind):
            self._fade(_PROMPTS_ALONE, _KEPT)
            self.reach *= _KEPT
        self.reach = max(self.reach, work.num_known)
        self._remember(kind, work, seconds, max(expected, seconds / 2))
        self._fit()

    def _judge(self, expected: float, seconds: float) -> float:
        """How long it counts as; notes how far off the expectation was."""
        off = math.log(seconds / expected)
        limit = min(_MOST_SURPRISE, max(_LEAST_SURPRISE, _SURPRISE_TIMES * self.error))
        self.error += _NEWEST * (min(abs(off), limit) - self.error)
        if abs(off) <= limit:
            self._surprises.clear()
            return seconds
        if self._surprises and (self._surprises[-1] > 0) is not (off > 0):
            self._surprises.clear()
        self._surprises.append(off)
        if len(self._surprises) < _NUM_SURPRISES:
            return expected * math.exp(math.copysign(limit, off))
        self._change_pace(math.exp(statistics.median(self._surprises)))
        self._surprises.clear()
        return seconds

    def _change_pace(self, times: float) -> None:
        """Whatever a step holds takes `times` as long as before."""
        for rows in self._evidence.values():
            for row in rows:
                row[_NUM_TERMS] *= times
        for kind in self._evidence:
            self._fade(kind, _KEPT_OF_BEFORE)
        self.law = Law(*(times * value for value in self.law))

    def _remember(self, kind: Kind, work: Work, seconds: float, scale: float) -> None:
        """Its errors count relative to `scale`."""
        self._fade(kind, _KEPT)
        if kind not in self._evidence:
            self._evidence[kind] = [[0.0] * (_NUM_TERMS + 1) for _ in range(_NUM_TERMS)]
        known, pairs, decodes, context = work
        terms = (known, pairs, 1.0, decodes, context, seconds)  # in the order of Law
        scaled = [term / scale for term in terms]
        for row, term in zip(self._evidence[kind], scaled, strict=False):
            for index, other in enumerate(scaled):
                row[index] += term * other

    def _fade(self, kind: Kind, kept: float) -> None:
        for row in self._evidence.get(kind, ()):
            row[:] = [value * kept for value in row]

    def _fit(self) -> None:
        """Coordinate descent, each coefficient in turn at its best beside the others, at least 0.

        In the order of Law: what a prompt alone took is first its tokens' and then any step's, so
        that a law that is not known well asks for smaller steps.
        """
        sums = [
            [sum(values) for values in zip(*rows, strict=True)]
            for rows in zip(*self._evidence.values(), strict=True)
        ]
        best = list(self.law)
        for _ in range(_NUM_PASSES):
            for index, row in enumerate(sums):
                if row[index] > 0:
                    rest = sum(map(operator.mul, row, best)) - row[index] * best[index]
                    best[index] = max(0.0, (row[_NUM_TERMS] - rest) / row[index])
        self.law = Law(*best)
