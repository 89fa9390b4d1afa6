"""One tenant's quota as this gateway holds it: granted ahead, spent without asking. Pure: no clock.

    granted = spent + returned + held + available

*held* is reserved by running requests at the most that they can use. What they did use is *spent*
when they end, the rest is available again. Requests count as spent at once, slots never: they are
held. Amounts are totals since the lease began, as the auth service counts them.
"""

import dataclasses
from dataclasses import dataclass

from infermesh.errors import InsufficientQuota, MeshError, RateLimitExceeded
from infermesh.quota import BUDGETS, LIMIT_WORDS, NOTHING, Amounts, Limits

# Of what was reserved in the last interval or two: some ten seconds of it, half a lease.
_AHEAD = 8
# Of the limits, at least: traffic that has just begun says little of what is to come. Of a budget
# less, since what a gateway holds when it is lost counts as spent.
_PART_OF_MINUTE, _PART_OF_BUDGET = 16, 1024


@dataclass(frozen=True, slots=True)
class State:
    """What is reported of a lease."""

    lease_id: str
    tenant: str
    spent: Amounts
    returned: Amounts
    needed: Amounts
    wanted: Amounts
    least_needed: Amounts
    closing: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """The auth service's answer to a state."""

    lease_id: str
    granted: Amounts
    valid_for_s: float
    ended: bool
    refused: MeshError | None
    remaining: Amounts
    requests_reset_s: float
    tokens_reset_s: float


def cost_of(limits: Limits, num_tokens: int) -> Amounts:
    """What a request takes of the kinds that are limited."""
    counts_tokens = (limits.tokens_per_minute, limits.daily_tokens, limits.monthly_tokens)
    return Amounts(
        requests=0 if limits.requests_per_minute is None else 1,
        tokens=num_tokens if any(limit is not None for limit in counts_tokens) else 0,
        slots=0 if limits.max_concurrency is None else 1,
    )


def refuse_impossible(tenant: str, limits: Limits, cost: Amounts) -> None:
    """Raises RateLimitExceeded or InsufficientQuota for a request that no wait could help."""
    amounts = {
        "tokens_per_minute": cost.tokens,
        "daily_tokens": cost.tokens,
        "monthly_tokens": cost.tokens,
        "requests_per_minute": cost.requests,
        "max_concurrency": cost.slots,
    }
    for name, amount in amounts.items():
        limit = getattr(limits, name)
        if limit is not None and amount > limit:
            error = InsufficientQuota if name in BUDGETS else RateLimitExceeded
            raise error(
                f"Request too large for tenant {tenant} on {LIMIT_WORDS[name]}: limit {limit}, "
                f"requested {amount}. Reduce the prompt or max_tokens."
            )


class Account:
    """One lease.

    Attributes:
        recent: reserved since the last tick and in the interval before; of slots the most
            that were held at once.
    """

    def __init__(self, lease_id: str, tenant: str) -> None:
        self.lease_id = lease_id
        self.tenant = tenant
        self.granted = self.spent = self.returned = self.held = NOTHING
        self.usable_until = float("-inf")
        self._now_reserved = self._before_reserved = NOTHING
        # What was in hand after the last grant.
        self._filled = NOTHING

    @property
    def recent(self) -> Amounts:
        now, before = self._now_reserved, self._before_reserved
        return dataclasses.replace(now + before, slots=max(now.slots, before.slots))

    @property
    def is_idle(self) -> bool:
        """Nothing runs, and nothing has begun lately."""
        return self.held == NOTHING and self.recent == NOTHING

    def available(self, now: float) -> Amounts:
        """What can be reserved."""
        if now >= self.usable_until:
            return NOTHING
        return (self.granted - self.spent - self.returned - self.held).at_least(NOTHING)

    def is_low(self, now: float) -> bool:
        """Less than half is left of what the last grant brought."""
        left = self.available(now)
        return self._filled.requests > 2 * left.requests or self._filled.tokens > 2 * left.tokens

    def reserve(self, cost: Amounts, now: float) -> bool:
        """Takes `cost`, where it is available."""
        if not self.available(now).covers(cost):
            return False
        self.spent += Amounts(requests=cost.requests)
        self.held += Amounts(tokens=cost.tokens, slots=cost.slots)
        reserved = self._now_reserved + cost
        peak = max(self._now_reserved.slots, self.held.slots)
        self._now_reserved = dataclasses.replace(reserved, slots=peak)
        return True

    def settle(self, cost: Amounts, used_tokens: int) -> None:
        """A request ended: of its tokens so many were used."""
        self.held -= Amounts(tokens=cost.tokens, slots=cost.slots)
        if cost.tokens:
            self.spent += Amounts(tokens=used_tokens)

    def tick(self) -> None:
        """An interval is over."""
        self._before_reserved, self._now_reserved = self._now_reserved, NOTHING

    def report(self, waiting: list[Amounts], now: float, limits: Limits) -> State:
        """What to tell, and to ask for.

        Keeps several times what was reserved lately, and no less than a part of the minute's
        limits, so that requests go on while the auth service is away; returns the rest, which
        others can use.
        """
        available = self.available(now)
        needed = sum(waiting, NOTHING)
        recent = self.recent
        target = Amounts(_AHEAD * recent.requests, _AHEAD * recent.tokens, recent.slots)
        target = target.at_least(_least_kept(limits))
        if not waiting and now < self.usable_until:
            excess = (available - target).at_least(NOTHING)
            self.returned += excess
            available -= excess
        short = (needed - available).at_least(NOTHING)
        spare = (available - needed).at_least(NOTHING)
        return State(
            lease_id=self.lease_id,
            tenant=self.tenant,
            spent=self.spent,
            returned=self.returned,
            needed=short,
            wanted=(target - spare).at_least(NOTHING),
            least_needed=_least(waiting),
        )

    def apply(self, grant: Grant, sent_at: float) -> None:
        """Takes in an answer to a report that was sent at `sent_at`."""
        self.granted = self.granted.at_least(grant.granted)
        # reckoned from before the auth service began to count: never longer than there
        self.usable_until = sent_at + grant.valid_for_s
        self._filled = self.available(sent_at)


def _least_kept(limits: Limits) -> Amounts:
    budgets = (limits.daily_tokens, limits.monthly_tokens)
    parts = [budget // _PART_OF_BUDGET for budget in budgets if budget is not None]
    return Amounts(
        requests=(limits.requests_per_minute or 0) // _PART_OF_MINUTE,
        tokens=min([(limits.tokens_per_minute or 0) // _PART_OF_MINUTE, *parts]),
    )


def _least(waiting: list[Amounts]) -> Amounts:
    if not waiting:
        return NOTHING
    least = waiting[0]
    for cost in waiting[1:]:
        least = least.at_most(cost)
    return least
