"""One tenant's lease at this gateway and the requests that wait for more of it. Asks nobody."""

import asyncio
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.auth.account import Account, Grant
from gateway.auth.open_account import OpenAccount
from infermesh.errors import MeshError, RateLimitExceeded
from infermesh.quota import NOTHING, Amounts, Limits

_RETRY_AFTER_S = 1.0
# After a refusal, requests that ask for no less are refused without asking.
_MEMORY_S = 0.2


@dataclass(frozen=True, slots=True)
class Hold:
    """What one request has reserved; the account lives and dies with its lease."""

    account: Account | OpenAccount
    cost: Amounts


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits; `asked`: a report under way tells of it."""

    cost: Amounts
    admitted: "asyncio.Future[Account | OpenAccount]"
    asked: bool = False


@dataclass(slots=True)
class TenantQuota:
    """A lease, who waits for it, and what was last said of it; `limits` as last heard of."""

    account: Account
    limits: Limits
    waiters: deque[Waiter] = field(default_factory=deque)
    last: Grant | None = None
    refused: tuple[float, Amounts, MeshError] | None = None

    @property
    def name(self) -> str:
        return self.account.tenant

    def refuse_again(self, cost: Amounts, now: float) -> None:
        """Raises the last refusal for a request that asks for no less so soon after."""
        if self.refused is not None:
            until, least, error = self.refused
            if now < until and cost.covers(least):
                raise _again(error)

    def wait(self, cost: Amounts) -> Waiter:
        """A request begins to wait."""
        waiter = Waiter(cost, asyncio.get_running_loop().create_future())
        self.waiters.append(waiter)
        return waiter

    def waiting_costs(self) -> list[Amounts]:
        """What to ask for; it is asked from now on."""
        for waiter in self.waiters:
            waiter.asked = True
        return [waiter.cost for waiter in self.waiters if waiter.cost != NOTHING]

    def begin_again(self) -> None:
        """The lease is over; who waits is asked for again, with a new one."""
        self.account = new_account(self.account.tenant)
        for waiter in self.waiters:
            waiter.asked = False

    def admit_waiters(self, now: float) -> None:
        """In the order of arrival; one that is too large is passed by smaller ones."""
        for waiter in list(self.waiters):
            if not waiter.admitted.done() and self.account.reserve(waiter.cost, now):
                self.waiters.remove(waiter)
                waiter.admitted.set_result(self.account)

    def open_waiters(self, reserve: Callable[[Amounts, float], OpenAccount], now: float) -> None:
        """Nobody grants: each is admitted, or refused, by `reserve`."""
        while self.waiters:
            waiter = self.waiters.popleft()
            if waiter.admitted.done():
                continue
            try:
                waiter.admitted.set_result(reserve(waiter.cost, now))
            except RateLimitExceeded as refusal:
                waiter.admitted.set_exception(refusal)

    def refuse_waiters(self, refusal: MeshError | None, now: float) -> None:
        """Those who were asked for, and got nothing."""
        asked = [waiter for waiter in self.waiters if waiter.asked]
        if not asked:
            return
        error = refusal or RateLimitExceeded(
            f"Rate limit reached for tenant {self.account.tenant}.",
            retry_after_s=_RETRY_AFTER_S,
        )
        for waiter in asked:
            self.waiters.remove(waiter)
            if not waiter.admitted.done():
                waiter.admitted.set_exception(_again(error))
        least = asked[0].cost
        for waiter in asked:
            least = least.at_most(waiter.cost)
        self.refused = (now + _MEMORY_S, least, error)


def new_account(tenant: str) -> Account:
    """A lease that has not begun."""
    return Account(secrets.token_hex(16), tenant)


def _again(error: MeshError) -> MeshError:
    """The same refusal for another request: each carries facts of its own."""
    return type(error)(error.message, retry_after_s=error.retry_after_s)
