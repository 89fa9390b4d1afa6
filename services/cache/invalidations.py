"""What was taken out lately, numbered, so that no answer that began before is kept after it.

An answer is as old as the beginning of its generation: a gateway carries the mark that it had then.
The numbers live as long as the process; a mark of another one is older than everything here.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from itertools import islice

from services.cache.domain import Keys, Mark

# A mark from before the last so many invalidations is refused, whatever they were of.
MAX_REMEMBERED = 256


class Invalidations:
    """All of this process, the latest with what they cover."""

    def __init__(self, instance: bytes | None = None) -> None:
        self._instance = instance or secrets.token_bytes(16)
        self._number = 0
        self._latest: deque[Callable[[Keys], bool]] = deque(maxlen=MAX_REMEMBERED)

    @property
    def mark(self) -> Mark:
        """Of what begins now."""
        return Mark(self._instance, self._number)

    def add(self, covers: Callable[[Keys], bool]) -> None:
        """Answers with such keys that began before are not to be kept any more."""
        self._number += 1
        self._latest.append(covers)

    def void(self, mark: Mark | None, keys: Keys) -> bool:
        """Whether an answer is too old to be kept, or may be."""
        if mark is None or mark.instance != self._instance or mark.number > self._number:
            return True
        num_since = self._number - mark.number
        if num_since > len(self._latest):
            return True
        return any(covers(keys) for covers in islice(reversed(self._latest), num_since))
