"""What one tenant is admitted for without a lease, while nobody can grant one. Pure: no clock.

A sliding minute of this gateway's own: it knows nothing of what others admit meanwhile, so that
over all gateways a tenant may use, beyond its limits, those limits once more per gateway (times
the share that the settings allow). Budgets of a day or month have no minute: never open.
"""

import math
from collections import deque

from infermesh.errors import RateLimitExceeded
from infermesh.quota import LIMIT_WORDS, NOTHING, Amounts, Limits

WINDOW_S = 60.0
_RETRY_AFTER_S = 1.0


def may_open(limits: Limits) -> bool:
    """Whether a tenant may be admitted without a lease at all."""
    return limits.daily_tokens is None and limits.monthly_tokens is None


class OpenAccount:
    """One tenant's.

    Attributes:
        owed: used without a lease, and not told to the auth service yet.
        held: reserved by running requests, at the most that they can use.
    """

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.owed = self.held = NOTHING
        # (until when it counts, amounts); in the order of time
        self._window: deque[tuple[float, Amounts]] = deque()

    def left(self, limits: Limits, share: float, now: float) -> Amounts:
        """What can be reserved; of kinds without a limit, nothing is ever asked for."""
        while self._window and self._window[0][0] <= now:
            self._window.popleft()
        used = sum((amounts for _, amounts in self._window), self.held)
        most = Amounts(
            math.floor((limits.requests_per_minute or 0) * share),
            math.floor((limits.tokens_per_minute or 0) * share),
            math.floor((limits.max_concurrency or 0) * share),
        )
        return (most - used).at_least(NOTHING)

    def reserve(self, limits: Limits, share: float, cost: Amounts, now: float) -> None:
        """Takes what a request costs, of the kinds that are limited.

        Raises:
            RateLimitExceeded: it would be more than this gateway's own minute allows.
        """
        left = self.left(limits, share, now)
        if not left.covers(cost):
            name = _missing(left, cost)
            wait_s = _RETRY_AFTER_S
            if name != "max_concurrency" and self._window:
                wait_s = max(self._window[0][0] - now, _RETRY_AFTER_S)
            raise RateLimitExceeded(
                f"Rate limit reached for tenant {self.tenant} on {LIMIT_WORDS[name]}, "
                "which is counted by this gateway alone for now.",
                retry_after_s=wait_s,
            )
        self._count(Amounts(requests=cost.requests), now)
        self.held += Amounts(tokens=cost.tokens, slots=cost.slots)

    def settle(self, cost: Amounts, used_tokens: int, now: float) -> None:
        """A request ended: of its tokens so many were used."""
        self.held -= Amounts(tokens=cost.tokens, slots=cost.slots)
        if cost.tokens:
            self._count(Amounts(tokens=used_tokens), now)

    def take_owed(self) -> Amounts:
        """What is to be told; it is not owed any more."""
        owed, self.owed = self.owed, NOTHING
        return owed

    def is_idle(self, now: float) -> bool:
        """Nothing runs, counts, or is to be told."""
        is_past = not self._window or self._window[-1][0] <= now
        return is_past and self.held == NOTHING and self.owed == NOTHING

    def _count(self, amounts: Amounts, now: float) -> None:
        if amounts != NOTHING:
            self._window.append((now + WINDOW_S, amounts))
            self.owed += amounts


def _missing(left: Amounts, cost: Amounts) -> str:
    if cost.requests > left.requests:
        return "requests_per_minute"
    return "tokens_per_minute" if cost.tokens > left.tokens else "max_concurrency"
