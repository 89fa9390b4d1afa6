"""When to run which texts together: three lanes of decreasing urgency. Time is an argument."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


class Lane(enum.IntEnum):
    """Who waits; a lower one goes first."""

    LOOKUP = 0
    EMBED = 1
    INDEX = 2


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """How a lane fills its batches."""

    max_batch: int
    # The first of a batch waits this long for company.
    max_wait_s: float
    max_queued: int


class BatchQueue(Generic[T]):
    """Items by lane, in order of arrival."""

    def __init__(self, limits: Mapping[Lane, LaneLimits]) -> None:
        self._limits = limits
        self._lanes: dict[Lane, deque[tuple[float, T]]] = {lane: deque() for lane in Lane}

    def room(self, lane: Lane) -> int:
        """Items that the lane still takes."""
        return self._limits[lane].max_queued - len(self._lanes[lane])

    def push(self, lane: Lane, item: T, now_s: float) -> bool:
        """False where the lane is full."""
        if self.room(lane) <= 0:
            return False
        self._lanes[lane].append((now_s, item))
        return True

    def take(self, now_s: float) -> tuple[Lane, list[T]] | None:
        """The next batch; None where nothing is due.

        A lookup does not wait for company while a lower lane would run: it would wait for that.
        """
        for lane in Lane:
            if self._due_s(lane) <= now_s:
                urgent = next(one for one in Lane if self._lanes[one])
                return self.take_lane(min(lane, urgent))
        return None

    def take_lane(self, lane: Lane) -> tuple[Lane, list[T]] | None:
        """A batch of one lane, due or not; None where it is empty."""
        waiting = self._lanes[lane]
        count = min(len(waiting), self._limits[lane].max_batch)
        return (lane, [waiting.popleft()[1] for _ in range(count)]) if count else None

    def wait_s(self, now_s: float) -> float | None:
        """Seconds until something is due; None where nothing waits."""
        due_s = min(self._due_s(lane) for lane in Lane)
        return None if due_s == float("inf") else max(0.0, due_s - now_s)

    def _due_s(self, lane: Lane) -> float:
        waiting, limits = self._lanes[lane], self._limits[lane]
        if not waiting:
            return float("inf")
        if len(waiting) >= limits.max_batch:
            return float("-inf")
        return waiting[0][0] + limits.max_wait_s
