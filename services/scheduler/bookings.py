"""Who was refused and told when to come back: one line per tenant, with room kept for its turn.

Without it all who were refused in one second would be told the same time, and come together. A
client is known again by its prompt, of which only a hash is kept; every map is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# What a client is told to wait at least and at most, and while no rate is known.
MIN_RETRY_S, MAX_RETRY_S, UNKNOWN_RETRY_S = 0.1, 60.0, 1.0
# Whole seconds of an HTTP header, and the way back.
GRACE_S = 2.5
_EARLY_S = 0.05
# Those who are told come a little slower than room is made: a rate is known to some percent, and
# told too fast, each would find the queue just full.
_SPACING = 1.1
_MAX_PER_TENANT = 2048
_MAX_TENANTS = 1024
_SWEEP_FROM, _SWEEP_EVERY_S = 64, 1.0


@dataclass(slots=True)
class _Booking:
    due_s: float
    num_tokens: int


@dataclass(slots=True)
class _Line:
    """One tenant's bookings; who is coming, in the order in which they are due."""

    coming: dict[int, _Booking] = field(default_factory=dict)
    due: dict[int, _Booking] = field(default_factory=dict)
    num_due_tokens: int = 0
    # From when on the next one may be told to come.
    free_at_s: float = 0.0

    def advance(self, now_s: float) -> None:
        """Who may come now is due; who has not come is forgotten."""
        while self.coming:
            key, booking = next(iter(self.coming.items()))
            if booking.due_s > now_s + _EARLY_S:
                break
            del self.coming[key]
            self.due[key] = booking
            self.num_due_tokens += booking.num_tokens
        for key in [key for key, one in self.due.items() if one.due_s + GRACE_S < now_s]:
            self.drop(key)

    def drop(self, key: int) -> None:
        """A due one is not waited for any more."""
        booking = self.due.pop(key, None)
        if booking is not None:
            self.num_due_tokens -= booking.num_tokens

    def num_tokens_before(self, key: int, until_s: float) -> int:
        """Of those that are due, and of those who will be, up to `until_s` or this one."""
        num_tokens = self.num_due_tokens
        for coming, booking in self.coming.items():
            if coming == key or booking.due_s > until_s:
                break
            num_tokens += booking.num_tokens
        return num_tokens

    def is_void(self, now_s: float) -> bool:
        """Nothing in it matters any more."""
        return not self.coming and not self.due and self.free_at_s <= now_s


class Bookings:
    """The lines of all tenants."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._swept_s = 0.0

    def __len__(self) -> int:
        return sum(len(line.coming) + len(line.due) for line in self._lines.values())

    def __bool__(self) -> bool:
        return bool(self._lines)

    def reserved(self, tenant: str, key: int, now_s: float, ahead_s: float = 0.0) -> int:
        """Tokens of its tenant for whose turn a newcomer must leave room; 0 at its own turn.

        Those, too, whose turn comes within `ahead_s`: there will be no new room until then.
        """
        line = self._lines.get(tenant)
        if line is None:
            return 0
        line.advance(now_s)
        if line.is_void(now_s):
            del self._lines[tenant]
        return 0 if key in line.due else line.num_tokens_before(key, now_s + ahead_s)

    def claim(self, tenant: str, key: int) -> None:
        """It was let in."""
        line = self._lines.get(tenant)
        if line is not None:
            line.drop(key)
            line.coming.pop(key, None)

    def book(
        self,
        tenant: str,
        key: int,
        num_tokens: int,
        num_excess_tokens: int,
        tokens_per_second: float | None,
        now_s: float,
    ) -> float:
        """When a refused client should come back, in seconds from now.

        Args:
            num_excess_tokens: that have to leave the queue before it fits in.
            tokens_per_second: of its tenant's, that leave the queue; None if unknown.
        """
        if not tokens_per_second:
            return UNKNOWN_RETRY_S
        line = self._line(tenant, now_s)
        booking = line.coming.get(key)
        if booking is not None:  # it came too early
            return max(MIN_RETRY_S, booking.due_s - now_s)
        due_s = now_s + max(MIN_RETRY_S, num_excess_tokens / tokens_per_second)
        if key in line.due:  # it came as told, and there was no room yet
            line.drop(key)
            due_s = min(due_s, now_s + MAX_RETRY_S)
            line.due[key] = _Booking(due_s, num_tokens)
            line.num_due_tokens += num_tokens
            return min(MAX_RETRY_S, due_s - now_s)
        due_s = max(due_s, line.free_at_s)
        if due_s - now_s > MAX_RETRY_S or len(line.coming) >= _MAX_PER_TENANT:
            return MAX_RETRY_S
        line.free_at_s = due_s + _SPACING * num_tokens / tokens_per_second
        line.coming[key] = _Booking(due_s, num_tokens)
        return due_s - now_s

    def _line(self, tenant: str, now_s: float) -> _Line:
        line = self._lines.get(tenant)
        if line is None:
            line = _Line()
            if len(self._lines) >= _SWEEP_FROM and now_s >= self._swept_s + _SWEEP_EVERY_S:
                self._sweep(now_s)
            if len(self._lines) < _MAX_TENANTS:  # else it gets a time and no place
                self._lines[tenant] = line
        line.advance(now_s)
        return line

    def _sweep(self, now_s: float) -> None:
        """Drops the lines in which nobody stands."""
        self._swept_s = now_s
        for line in self._lines.values():
            line.advance(now_s)
        self._lines = {t: line for t, line in self._lines.items() if not line.is_void(now_s)}
