"""Sequences that wait for a place, in the order of service, bounded in tokens; the drain rate.

The order inside a priority class is decided here and nowhere else: fairness among tenants is a
change of `_key`. Whether a waiting sequence fits is the planner's question.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence as Seq

from services.scheduler.sequence import Sequence

# Highest first.
PRIORITIES = (3, 2, 1)
# What a client is told to wait at least and at most, and while no rate is known.
_MIN_RETRY_S, _MAX_RETRY_S, _UNKNOWN_RETRY_S = 0.1, 60.0, 1.0


def _key(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


class WaitingQueue:
    """Priority class first, then arrival; who was preempted keeps the place of its arrival."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._classes: dict[int, list[Sequence]] = {priority: [] for priority in PRIORITIES}
        self._tokens_of_class = dict.fromkeys(PRIORITIES, 0)

    def __len__(self) -> int:
        return sum(map(len, self._classes.values()))

    def has_room(self, num_tokens: int) -> bool:
        """An empty queue takes anything, else a long request could never be served."""
        return self.num_tokens == 0 or self.num_tokens + num_tokens <= self.max_tokens

    def num_tokens_ahead(self, priority: int) -> int:
        """Tokens that are served before a newcomer of this class."""
        return sum(self._tokens_of_class[p] for p in PRIORITIES if p >= priority)

    def in_class(self, priority: int) -> Seq[Sequence]:
        """The waiting of one class in the order of service; don't change the queue meanwhile."""
        return self._classes[priority]

    def push(self, sequence: Sequence, num_tokens: int) -> None:
        """`num_tokens` are what it has to compute; preempted ones are never turned away."""
        sequence.queued_tokens = num_tokens
        self._count(sequence.priority, num_tokens)
        insort(self._classes[sequence.priority], sequence, key=_key)

    def remove(self, sequence: Sequence) -> None:
        """Takes out a sequence that waits here."""
        line = self._classes[sequence.priority]
        index = bisect_left(line, _key(sequence), key=_key)
        if index == len(line) or line[index] is not sequence:
            raise ValueError("the sequence does not wait here")
        del line[index]
        self._count(sequence.priority, -sequence.queued_tokens)
        sequence.queued_tokens = 0

    def __contains__(self, sequence: Sequence) -> bool:
        line = self._classes[sequence.priority]
        index = bisect_left(line, _key(sequence), key=_key)
        return index < len(line) and line[index] is sequence

    def _count(self, priority: int, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        self._tokens_of_class[priority] += num_tokens


class Throughput:
    """Tokens computed over the last seconds, told step by step by a caller that has a clock.

    As a drain rate it is worth what it was told: of steps that were full of waiting tokens.
    """

    def __init__(self, horizon_s: float = 10.0) -> None:
        self._horizon_s = horizon_s
        self._steps: deque[tuple[float, int, float]] = deque()
        self._tokens = 0
        self._busy_s = 0.0
        self._last_s = 0.0

    def record(self, sent_s: float, done_s: float, num_tokens: int) -> None:
        """One step; the device was busy with it since it was sent or the one before was done."""
        busy_s = max(0.0, done_s - max(sent_s, self._last_s))
        self._last_s = done_s
        self._steps.append((done_s, num_tokens, busy_s))
        self._tokens += num_tokens
        self._busy_s += busy_s
        self._forget(done_s)

    def tokens_per_second(self, now_s: float) -> float:
        """What was computed lately, idle time included; 0 where nothing was."""
        self._forget(now_s)
        if not self._steps:
            return 0.0
        return self._tokens / max(now_s - self._steps[0][0] + self._steps[0][2], 1e-3)

    def drain_rate(self) -> float | None:
        """Tokens per second of busy time; None before the first step."""
        return self._tokens / self._busy_s if self._busy_s > 0 else None

    def seconds_for(self, num_tokens: int) -> float | None:
        """How long that many tokens take at the drain rate; None where it is unknown."""
        rate = self.drain_rate()
        return num_tokens / rate if rate else None

    def retry_after_s(self, excess_tokens: int) -> float:
        """When that much of the queue will be gone."""
        wait_s = self.seconds_for(excess_tokens)
        if wait_s is None:
            return _UNKNOWN_RETRY_S
        return min(_MAX_RETRY_S, max(_MIN_RETRY_S, wait_s))

    def _forget(self, now_s: float) -> None:
        # The last step stays: a rate from before a pause beats none.
        while len(self._steps) > 1 and self._steps[0][0] < now_s - self._horizon_s:
            _, tokens, busy_s = self._steps.popleft()
            self._tokens -= tokens
            self._busy_s -= busy_s
