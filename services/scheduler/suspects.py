"""Who may be crashing the device: runs suspects alone, one after another, and convicts.

A sequence in flight at `max_crashes` breaks without a token since, here or at other replicas, is
a suspect. It runs alone until it gets a token (then it is cleared) or the stream breaks again (then
it is poisonous, proven). One that waits for its turn is in flight at nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from services.scheduler.sequence import Sequence


class Suspects:
    """Counts breaks per sequence."""

    def __init__(self, max_crashes: int) -> None:
        self._max_crashes = max_crashes
        self._line: deque[Sequence] = deque()

    @property
    def solo(self) -> Sequence | None:
        """The one that must run alone now."""
        while self._line and self._line[0].is_over:
            self._line.popleft()
        return self._line[0] if self._line else None

    def record_break(self, in_flight: Iterable[Sequence]) -> Sequence | None:
        """These were in unanswered steps; returns the one that is poisonous beyond doubt."""
        solo = self.solo
        for sequence in in_flight:
            if sequence is solo:
                self._line.popleft()
                return sequence
            sequence.num_crashes += 1
            self.consider(sequence)
        return None

    def consider(self, sequence: Sequence) -> bool:
        """Puts it in line where it has crashed enough. True where it now needs the device."""
        if sequence.num_crashes < self._max_crashes or sequence in self._line:
            return False
        was_free = self.solo is None
        self._line.append(sequence)
        return was_free

    def clear(self, sequence: Sequence) -> bool:
        """It got a token. True where the next suspect now needs the device for itself."""
        sequence.num_crashes = 0
        if not self._line or sequence is not self.solo:
            return False
        self._line.popleft()
        return self.solo is not None
