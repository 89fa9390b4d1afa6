"""When silence means that a peer, or a worker, is wedged. Pure: time is passed in.

How long is too long depends on what it does; our own stalls are no silence of others.
"""

from collections import deque
from collections.abc import Callable

_NUM_RECENT = 32
_TIMES_PREDICTED = 10.0


class Silence:
    """Seconds since a peer was last heard, in time in which we listened.

    Args:
        clock: monotonic seconds.
        longest_look_s: more than this between two looks was a stall of this process.
    """

    def __init__(self, clock: Callable[[], float], longest_look_s: float) -> None:
        self._clock = clock
        self._longest_look_s = longest_look_s
        self._looked_at = clock()
        self._seconds = 0.0

    def heard(self) -> None:
        """The peer gave a sign of life."""
        self._seconds = 0.0
        self._looked_at = self._clock()

    def look(self) -> float:
        """How long it has been silent; to be called often."""
        now = self._clock()
        self._seconds += min(now - self._looked_at, self._longest_look_s)
        self._looked_at = now
        return self._seconds


class Patience:
    """How long a step may take, by the recent ones.

    Args:
        floor_s: any step may take this long.
        unknown_s: the same while no step of about that size was seen: a device may compile or
            page in first.
    """

    def __init__(self, floor_s: float, unknown_s: float) -> None:
        self._floor_s = floor_s
        self._unknown_s = max(floor_s, unknown_s)
        self._recent: deque[tuple[int, float]] = deque(maxlen=_NUM_RECENT)
        self._most_tokens = 0

    def reset(self) -> None:
        """Another device, or another process on it."""
        self._recent.clear()
        self._most_tokens = 0

    def took(self, num_tokens: int, seconds: float) -> None:
        """A step of that many query tokens was computed."""
        self._recent.append((num_tokens, seconds))
        self._most_tokens = max(self._most_tokens, num_tokens)

    def limit_s(self, num_tokens: int) -> float:
        """After this long, a step of that many query tokens is not slow but stuck."""
        if not self._recent or num_tokens > 2 * self._most_tokens:
            return self._unknown_s
        predicted_s = max(
            seconds * max(1.0, num_tokens / max(1, tokens)) for tokens, seconds in self._recent
        )
        return max(self._floor_s, _TIMES_PREDICTED * predicted_s)
