"""Keeps each limited tenant's lease filled, so that requests are admitted without asking.

One stream to the auth service; a report goes out every second, or at once where requests wait.
A request waits only when its tenant's lease is short; it is refused when the auth service had no
more to give.
"""

import asyncio
import dataclasses
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from gateway.auth.account import Account, Grant, State, cost_of, refuse_impossible
from gateway.auth.translate import grant_from_pb, state_to_pb
from gateway.identity import Principal
from infermesh.errors import (
    AuthUnavailable,
    MeshError,
    ProtocolViolation,
    RateLimitExceeded,
    as_mesh_error,
)
from infermesh.quota import NOTHING, Amounts
from infermesh.telemetry import logs
from infermesh.v1 import auth_service_pb2 as pb

if TYPE_CHECKING:  # the type of the asyncio stub exists in the stubs alone
    from infermesh.v1.auth_service_pb2_grpc import AuthServiceAsyncStub

_log = logs.get(__name__)
REPORT_S = 1.0
# A request waits so long for quota while the auth service is away.
_PATIENCE_S = 1.5
_ANSWER_S = 3.0
_RETRY_S = 0.1
_RETRY_AFTER_S = 1.0
# After a refusal, requests that ask for no less are refused without asking.
_MEMORY_S = 0.2
_MAX_WAITING = 10_000
# the last: a call that has ended by itself can't be written
_BROKEN = (grpc.aio.AioRpcError, MeshError, TimeoutError, asyncio.InvalidStateError)


@dataclass(slots=True, eq=False)
class _Waiter:
    cost: Amounts
    admitted: "asyncio.Future[Account]"
    asked: bool = False


@dataclass(slots=True)
class _Tenant:
    """A lease, who waits for it, and what was last said of it."""

    account: Account
    waiters: deque[_Waiter] = field(default_factory=deque)
    last: Grant | None = None
    refused: tuple[float, Amounts, MeshError] | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    """What one request has reserved; the account lives and dies with its lease."""

    account: Account
    cost: Amounts


class LeaseKeeper:
    """The leases of this gateway.

    Args:
        clock: monotonic seconds.
    """

    def __init__(
        self, stub: "AuthServiceAsyncStub", gateway_id: str, clock: Callable[[], float]
    ) -> None:
        self._stub = stub
        incarnation = secrets.token_hex(16)
        self._hello = pb.LeaseHello(gateway_id=gateway_id or incarnation, incarnation=incarnation)
        self._clock = clock
        self._tenants: dict[str, _Tenant] = {}
        self._wake = asyncio.Event()
        self._connected = False

    async def reserve(self, principal: Principal, num_tokens: int) -> Hold | None:
        """Reserves for one request; None where its tenant has no limits.

        Raises:
            RateLimitExceeded, InsufficientQuota: there is no more.
            AuthUnavailable: the lease is used up, and the auth service does not answer.
        """
        cost = cost_of(principal.limits, num_tokens)
        if cost == NOTHING:
            return None
        refuse_impossible(principal.tenant, principal.limits, cost)
        tenant = self._tenant(principal.tenant)
        if not tenant.waiters and tenant.account.reserve(cost, self._clock()):
            return Hold(tenant.account, cost)
        if tenant.refused is not None:
            until, least, error = tenant.refused
            if self._clock() < until and cost.covers(least):
                raise _again(error)
        return await self._wait(tenant, cost)

    async def tokens_left(self, principal: Principal) -> int | None:
        """What is left to a tenant of its minute, day and month; None where it has no such limits.

        Raises:
            AuthUnavailable: it is not known, and the auth service does not answer.
        """
        if principal.limits.most_tokens is None:
            return None
        tenant = self._tenant(principal.tenant)
        if tenant.last is None:
            await self._wait(tenant, NOTHING)  # for a first answer
        assert tenant.last is not None
        return tenant.last.remaining.tokens + tenant.account.available(self._clock()).tokens

    def settle(self, hold: Hold, used_tokens: int) -> None:
        """A request ended."""
        hold.account.settle(hold.cost, used_tokens)
        tenant = self._tenants.get(hold.account.tenant)
        if tenant is not None and tenant.account is hold.account and tenant.waiters:
            self._admit_waiters(tenant)

    def last_grant(self, tenant: str) -> tuple[Grant, Amounts] | None:
        """What the auth service last said of a tenant, and what is available here beyond that."""
        found = self._tenants.get(tenant)
        if found is None or found.last is None:
            return None
        return found.last, found.account.available(self._clock())

    def forget_refusal(self, tenant: str) -> None:
        """Its limits may be others now."""
        if tenant in self._tenants:
            self._tenants[tenant].refused = None
            self._wake.set()

    async def run(self) -> None:
        """Reports, reconnecting, until cancelled."""
        while True:
            try:
                await self._report_on(self._stub.Lease())
            except _BROKEN as exc:
                self._connected = False
                _log.debug("lease stream broke", extra={"error": as_mesh_error(exc).message})
            await asyncio.sleep(_RETRY_S)

    async def close(self) -> None:
        """Ends the leases of tenants for whom nothing runs; what is left of them is free at once.

        Raises:
            grpc.aio.AioRpcError: the auth service does not answer.
        """
        states = []
        for name, tenant in list(self._tenants.items()):
            if tenant.account.held == NOTHING and not tenant.waiters:
                del self._tenants[name]
                state = tenant.account.report([], self._clock())
                states.append(dataclasses.replace(state, wanted=NOTHING, closing=True))
        if not states:
            return
        call: Any = self._stub.Lease(timeout=_ANSWER_S)
        try:
            await call.write(pb.LeaseRequest(hello=self._hello))
            report = pb.LeaseReport(leases=map(state_to_pb, states))
            await call.write(pb.LeaseRequest(report=report))
            await call.read()
        finally:
            call.cancel()

    async def _wait(self, tenant: _Tenant, cost: Amounts) -> Hold:
        if len(tenant.waiters) >= _MAX_WAITING:
            raise AuthUnavailable("too many requests wait for quota", retry_after_s=_RETRY_AFTER_S)
        waiter = _Waiter(cost, asyncio.get_running_loop().create_future())
        tenant.waiters.append(waiter)
        self._wake.set()
        try:
            async with asyncio.timeout(_PATIENCE_S + (_ANSWER_S if self._connected else 0.0)):
                return Hold(await waiter.admitted, cost)
        except BaseException as exc:
            self._leave(tenant, waiter)
            if not isinstance(exc, TimeoutError):
                raise
            raise AuthUnavailable(
                "the tenant's quota can't be asked for now; try again",
                retry_after_s=_RETRY_AFTER_S,
            ) from None

    def _leave(self, tenant: _Tenant, waiter: _Waiter) -> None:
        """A waiter that went away gives back what it may have got in the same moment."""
        if waiter in tenant.waiters:
            tenant.waiters.remove(waiter)
        future = waiter.admitted
        if future.done() and not future.cancelled() and future.exception() is None:
            self.settle(Hold(future.result(), waiter.cost), 0)

    def _tenant(self, name: str) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(_new_account(name))
        return tenant

    async def _report_on(self, call: Any) -> None:
        try:
            await call.write(pb.LeaseRequest(hello=self._hello))
            # answered before any interval is over: what is in hand does not dwindle in an outage
            await self._exchange(call, everyone=True)
            next_tick = self._clock() + REPORT_S
            while True:
                if self._clock() >= next_tick:
                    next_tick = self._clock() + REPORT_S
                    for tenant in self._tenants.values():
                        tenant.account.tick()
                    await self._exchange(call, everyone=True)
                else:
                    await self._exchange(call, everyone=False)
                await self._woken(next_tick - self._clock())
        finally:
            call.cancel()

    async def _woken(self, wait_s: float) -> None:
        try:
            async with asyncio.timeout(max(wait_s, 0.0)):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _exchange(self, call: Any, *, everyone: bool) -> None:
        self._wake.clear()
        now = self._clock()
        states = [
            self._state(name, tenant, now)
            for name, tenant in list(self._tenants.items())
            if everyone or tenant.waiters
        ]
        if not states:
            return
        report = pb.LeaseReport(leases=map(state_to_pb, states))
        async with asyncio.timeout(_ANSWER_S):
            await call.write(pb.LeaseRequest(report=report))
            answer = await call.read()
        if not isinstance(answer, pb.LeaseResponse):
            # the stream ended: the call's status says why
            raise AuthUnavailable((await call.details()) or "the lease stream ended")
        self._connected = True
        if len(answer.grants) != len(states):
            raise ProtocolViolation("a lease report was not answered in full")
        for state, message in zip(states, answer.grants, strict=True):
            self._apply(state, grant_from_pb(message), now)

    def _state(self, name: str, tenant: _Tenant, now: float) -> State:
        account = tenant.account
        if account.granted != NOTHING and now >= account.usable_until:
            # what was left of it counts as spent by now; its requests run on without it
            account = tenant.account = _new_account(name)
        for waiter in tenant.waiters:
            waiter.asked = True
        costs = [waiter.cost for waiter in tenant.waiters if waiter.cost != NOTHING]
        state = account.report(costs, now)
        if account.is_idle and not tenant.waiters:
            del self._tenants[name]
            return dataclasses.replace(state, closing=True)
        return state

    def _apply(self, state: State, grant: Grant, sent_at: float) -> None:
        tenant = self._tenants.get(state.tenant)
        if tenant is None or tenant.account.lease_id != grant.lease_id:
            return
        if grant.ended and tenant.account.granted == NOTHING:
            # a lease that ends before it began: the auth service does not know the tenant
            unknown = AuthUnavailable(f"the auth service has no quota for {state.tenant}")
            self._refuse_waiters(tenant, unknown)
            return
        if grant.ended:
            tenant.account = _new_account(state.tenant)
            for waiter in tenant.waiters:
                waiter.asked = False
            self._wake.set()
            return
        tenant.account.apply(grant, sent_at)
        tenant.last = grant
        self._admit_waiters(tenant)
        self._refuse_waiters(tenant, grant.refused)
        if tenant.waiters:
            self._wake.set()

    def _admit_waiters(self, tenant: _Tenant) -> None:
        """In the order of arrival; one that is too large is passed by smaller ones."""
        now = self._clock()
        for waiter in list(tenant.waiters):
            if not waiter.admitted.done() and tenant.account.reserve(waiter.cost, now):
                tenant.waiters.remove(waiter)
                waiter.admitted.set_result(tenant.account)

    def _refuse_waiters(self, tenant: _Tenant, refusal: MeshError | None) -> None:
        asked = [waiter for waiter in tenant.waiters if waiter.asked]
        if not asked:
            return
        error = refusal or RateLimitExceeded(
            f"Rate limit reached for tenant {tenant.account.tenant}.",
            retry_after_s=_RETRY_AFTER_S,
        )
        for waiter in asked:
            tenant.waiters.remove(waiter)
            if not waiter.admitted.done():
                waiter.admitted.set_exception(_again(error))
        least = asked[0].cost
        for waiter in asked:
            least = least.at_most(waiter.cost)
        tenant.refused = (self._clock() + _MEMORY_S, least, error)


def _again(error: MeshError) -> MeshError:
    """The same refusal for another request: each carries facts of its own."""
    return type(error)(error.message, retry_after_s=error.retry_after_s)


def _new_account(tenant: str) -> Account:
    return Account(secrets.token_hex(16), tenant)
