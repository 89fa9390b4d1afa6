"""Limits of a tenant and amounts of its quota: what auth grants and gateways spend. Values only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from infermesh.v1 import auth_service_pb2 as pb


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may use; None: unlimited, 0: nothing."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None
    daily_tokens: int | None = None
    monthly_tokens: int | None = None

    @property
    def most_tokens(self) -> int | None:
        """What one request could ever be admitted for; None: any number."""
        each = (self.tokens_per_minute, self.daily_tokens, self.monthly_tokens)
        return min((limit for limit in each if limit is not None), default=None)


# What a refusal calls each limit.
LIMIT_WORDS = {
    "requests_per_minute": "requests per minute",
    "tokens_per_minute": "tokens per minute",
    "max_concurrency": "requests at once",
    "daily_tokens": "tokens per day",
    "monthly_tokens": "tokens per month",
}
# Running out of these is no matter of seconds.
BUDGETS = frozenset({"daily_tokens", "monthly_tokens"})


@dataclass(frozen=True, slots=True)
class Amounts:
    """Requests, tokens and slots of concurrency; never negative in a valid state."""

    requests: int = 0
    tokens: int = 0
    slots: int = 0

    def __add__(self, other: Amounts) -> Amounts:
        return Amounts(
            self.requests + other.requests, self.tokens + other.tokens, self.slots + other.slots
        )

    def __sub__(self, other: Amounts) -> Amounts:
        return Amounts(
            self.requests - other.requests, self.tokens - other.tokens, self.slots - other.slots
        )

    def at_most(self, other: Amounts) -> Amounts:
        """The lesser of both, each kind by itself."""
        return Amounts(
            min(self.requests, other.requests),
            min(self.tokens, other.tokens),
            min(self.slots, other.slots),
        )

    def at_least(self, other: Amounts) -> Amounts:
        """The greater of both, each kind by itself."""
        return Amounts(
            max(self.requests, other.requests),
            max(self.tokens, other.tokens),
            max(self.slots, other.slots),
        )

    def covers(self, other: Amounts) -> bool:
        """Nothing of `other` is more than this."""
        return self.at_least(other) == self


NOTHING = Amounts()


def limits_from_pb(message: pb.TenantLimits) -> Limits:
    """Absent fields are unlimited."""
    given = {name: getattr(message, name) for name in _LIMITS if message.HasField(name)}  # type: ignore[arg-type]  # they are its fields
    return Limits(**given)


def limits_to_pb(limits: Limits) -> pb.TenantLimits:
    """The inverse of `limits_from_pb`."""
    return pb.TenantLimits(**dataclasses.asdict(limits))


def amounts_from_pb(message: pb.QuotaAmounts) -> Amounts:
    """Amounts off the wire."""
    return Amounts(message.requests, message.tokens, message.slots)


def amounts_to_pb(amounts: Amounts) -> pb.QuotaAmounts:
    """Amounts for the wire; none is negative."""
    return pb.QuotaAmounts(requests=amounts.requests, tokens=amounts.tokens, slots=amounts.slots)


_LIMITS = tuple(field.name for field in dataclasses.fields(Limits))
