"""When a replica gets requests again: a circuit breaker, and a slow start for one that returns.

    CLOSED ──failures──► OPEN ──cool-down──► HALF_OPEN ──a probe succeeds──► CLOSED
                           ▲──────────────────────┘ a failure; the next cool-down is longer

Pure: time and chance are passed in. What counts as a failure is `replica/client.py`'s.
"""

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


class Circuit(enum.IntEnum):
    """Whether requests go there; the numbers are the metric's."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """A replica that is restarted now and then keeps its circuit closed."""

    max_failures: int = 5
    window_s: float = 30.0
    cool_down_s: float = 1.0
    longest_cool_down_s: float = 60.0
    num_probes: int = 2
    # A probe of which nothing was heard makes room for another.
    probe_timeout_s: float = 10.0


class CircuitBreaker:
    """The circuit of one replica.

    Args:
        clock: monotonic seconds.
        draw: uniform in [0, 1): gateways must not all try again at once.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        draw: Callable[[], float],
        settings: BreakerSettings = BreakerSettings(),
    ) -> None:
        self._clock = clock
        self._draw = draw
        self._settings = settings
        self._failed_at: deque[float] = deque(maxlen=settings.max_failures)
        self._probed_at: list[float] = []
        # Open, then half-open; None: closed.
        self._open_until: float | None = None
        self._num_openings = 0
        self._last_closed_at = 0.0

    @property
    def circuit(self) -> Circuit:
        if self._open_until is None:
            return Circuit.CLOSED
        return Circuit.OPEN if self._clock() < self._open_until else Circuit.HALF_OPEN

    @property
    def permits(self) -> bool:
        """A request may go there now."""
        circuit = self.circuit
        if circuit is not Circuit.HALF_OPEN:
            return circuit is Circuit.CLOSED
        self._forget_lost_probes()
        return len(self._probed_at) < self._settings.num_probes

    @property
    def retry_after_s(self) -> float:
        """Until a request may go there, as far as time decides it."""
        if self._open_until is None:
            return 0.0
        return max(0.0, self._open_until - self._clock())

    def chosen(self) -> None:
        """A request goes there: a probe, where the circuit is half-open."""
        if self.circuit is Circuit.HALF_OPEN:
            self._probed_at.append(self._clock())

    def succeeded(self) -> bool:
        """It computes. True where that closed the circuit."""
        if self.circuit is not Circuit.HALF_OPEN:
            return False  # a stream that was there before says nothing of the next request
        self._open_until = None
        self._last_closed_at = self._clock()
        self._failed_at.clear()
        return True

    def failed(self) -> None:
        """One failure, however many requests it hit."""
        now, settings = self._clock(), self._settings
        circuit = self.circuit
        if circuit is Circuit.OPEN:
            return
        self._failed_at.append(now)
        is_full = len(self._failed_at) == settings.max_failures
        if circuit is Circuit.HALF_OPEN or (
            is_full and now - self._failed_at[0] <= settings.window_s
        ):
            self._open(now)

    def _open(self, now: float) -> None:
        settings = self._settings
        if self._open_until is None and now - self._last_closed_at > settings.window_s:
            self._num_openings = 0  # it has been well for a while
        doubled_s = settings.cool_down_s * 2.0 ** min(self._num_openings, 30)
        cool_down_s = min(settings.longest_cool_down_s, doubled_s)
        self._num_openings += 1
        self._open_until = now + cool_down_s * (0.5 + 0.5 * self._draw())
        self._probed_at.clear()

    def _forget_lost_probes(self) -> None:
        oldest = self._clock() - self._settings.probe_timeout_s
        self._probed_at = [at for at in self._probed_at if at > oldest]


class SlowStart:
    """How many resumed streams a returning replica gets: few, then twice as many, and so on.

    All streams that wait for it would else prefill there in one instant.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        first: int = 8,
        doubling_s: float = 0.25,
        duration_s: float = 3.0,
    ) -> None:
        self._clock = clock
        self._first = first
        self._doubling_s = doubling_s
        self._duration_s = duration_s
        self._began_at: float | None = None
        self._num_chosen = 0

    @property
    def active(self) -> bool:
        """It still holds back."""
        return self._began_at is not None and self._clock() - self._began_at < self._duration_s

    @property
    def permits(self) -> bool:
        """One more may go there now."""
        if self._began_at is None or not self.active:
            return True
        doublings = int((self._clock() - self._began_at) / self._doubling_s)
        return self._num_chosen < self._first << doublings

    def begin(self) -> None:
        """The replica is back."""
        self._began_at = self._clock()
        self._num_chosen = 0

    def chosen(self) -> None:
        """One goes there."""
        self._num_chosen += 1
