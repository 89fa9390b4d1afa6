"""Keeps each limited tenant's lease filled, so that requests are admitted without asking.

One stream to the auth service; a report goes out every second, or at once where a lease is short.
A request waits only when its tenant's lease is short; it is refused when the auth service had no
more to give.
"""

import asyncio
import dataclasses
import functools
import secrets
from collections.abc import Callable, Iterable

from gateway.auth.account import Grant, State, cost_of, refuse_impossible
from gateway.auth.fail_open import CLOSED, FailOpen, FailPolicy
from gateway.auth.instances import Picker
from gateway.auth.lease_stream import BROKEN, LeaseStream
from gateway.auth.open_account import OpenAccount
from gateway.auth.tenant_quota import Hold, TenantQuota, Waiter, new_account
from gateway.auth.verifier import PATIENCE_S
from gateway.identity import Principal
from infermesh.errors import AuthUnavailable, as_mesh_error
from infermesh.quota import NOTHING, Amounts
from infermesh.telemetry import logs
from infermesh.v1 import auth_service_pb2 as pb

_log = logs.get(__name__)
REPORT_S = 1.0
_RETRY_S = 0.1
_RETRY_AFTER_S = 1.0
# Tenants per message. Each is a transaction of its own there, some milliseconds long: all of them
# in one message would outlast the time for an answer, and every lease would run out.
MAX_REPORTED = 32
_MAX_WAITING = 10_000


class LeaseKeeper:
    """The leases of this gateway.

    Args:
        clock: monotonic seconds.
        policy: what becomes of requests that no lease covers while the auth service is away.
    """

    def __init__(
        self,
        auth: Picker,
        gateway_id: str,
        clock: Callable[[], float],
        policy: FailPolicy = CLOSED,
    ) -> None:
        self._auth = auth
        self._fail_open = FailOpen(policy)
        incarnation = secrets.token_hex(16)
        self._hello = pb.LeaseHello(gateway_id=gateway_id or incarnation, incarnation=incarnation)
        self._clock = clock
        self._tenants: dict[str, TenantQuota] = {}
        self._wake = asyncio.Event()

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
        tenant = self._tenant(principal)
        now = self._clock()
        if not tenant.waiters and tenant.account.reserve(cost, now):
            if tenant.account.is_low(now):
                self._wake.set()
            return Hold(tenant.account, cost)
        if self._fail_open.admits(principal.limits, now):
            return Hold(self._fail_open.reserve(tenant.name, principal.limits, cost, now), cost)
        tenant.refuse_again(cost, now)
        return await self._wait(tenant, cost)

    async def tokens_left(self, principal: Principal) -> int | None:
        """What is left to a tenant of its minute, day and month; None where it has no such limits.

        Raises:
            AuthUnavailable: it is not known, and the auth service does not answer.
        """
        if principal.limits.most_tokens is None:
            return None
        tenant = self._tenant(principal)
        if tenant.last is None and not self._fail_open.admits(principal.limits, self._clock()):
            await self._wait(tenant, NOTHING)  # for a first answer, or an outage
        if tenant.last is None or self._fail_open.admits(principal.limits, self._clock()):
            return self._fail_open.tokens_left(tenant.name, principal.limits, self._clock())
        return tenant.last.remaining.tokens + tenant.account.available(self._clock()).tokens

    def settle(self, hold: Hold, used_tokens: int) -> None:
        """A request ended."""
        if isinstance(hold.account, OpenAccount):
            hold.account.settle(hold.cost, used_tokens, self._clock())
            return
        hold.account.settle(hold.cost, used_tokens)
        tenant = self._tenants.get(hold.account.tenant)
        if tenant is not None and tenant.account is hold.account and tenant.waiters:
            tenant.admit_waiters(self._clock())

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
            stub = self._auth.stub
            try:
                await self._report_on(LeaseStream(stub, self._hello))
            except BROKEN as exc:
                _log.debug("lease stream broke", extra={"error": as_mesh_error(exc).message})
                self._auth.failed(stub)
                self._fail_open.asked(self._clock())
                self._open_waiters()
            await asyncio.sleep(_RETRY_S)

    async def close(self) -> None:
        """Ends the leases of tenants for whom nothing runs; what is left of them is free at once.

        Raises:
            one of BROKEN: the auth service does not answer.
        """
        states = []
        for name, tenant in list(self._tenants.items()):
            if tenant.account.held == NOTHING and not tenant.waiters:
                del self._tenants[name]
                state = tenant.account.report([], self._clock(), tenant.limits)
                states.append(dataclasses.replace(state, wanted=NOTHING, closing=True))
        if not states:
            return
        stream = LeaseStream(self._auth.stub, self._hello)
        try:
            await stream.open()
            for start in range(0, len(states), MAX_REPORTED):
                await stream.exchange(states[start : start + MAX_REPORTED])
        finally:
            stream.cancel()

    async def _wait(self, tenant: TenantQuota, cost: Amounts) -> Hold:
        if len(tenant.waiters) >= _MAX_WAITING:
            raise AuthUnavailable("too many requests wait for quota", retry_after_s=_RETRY_AFTER_S)
        waiter = tenant.wait(cost)
        self._wake.set()
        try:
            async with asyncio.timeout(PATIENCE_S):
                return Hold(await waiter.admitted, cost)
        except BaseException as exc:
            self._leave(tenant, waiter)
            if not isinstance(exc, TimeoutError):
                raise
            raise AuthUnavailable(
                "the tenant's quota can't be asked for now; try again",
                retry_after_s=_RETRY_AFTER_S,
            ) from None

    def _leave(self, tenant: TenantQuota, waiter: Waiter) -> None:
        """A waiter that went away gives back what it may have got in the same moment."""
        if waiter in tenant.waiters:
            tenant.waiters.remove(waiter)
        future = waiter.admitted
        if future.done() and not future.cancelled() and future.exception() is None:
            self.settle(Hold(future.result(), waiter.cost), 0)

    def _tenant(self, principal: Principal) -> TenantQuota:
        name, limits = principal.tenant, principal.limits
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = TenantQuota(new_account(name), limits)
        tenant.limits = limits
        return tenant

    def _open_waiters(self) -> None:
        """Nobody answers those who wait; the policy may."""
        now = self._clock()
        for tenant in self._tenants.values():
            if self._fail_open.admits(tenant.limits, now):
                reserve = functools.partial(self._fail_open.reserve, tenant.name, tenant.limits)
                tenant.open_waiters(reserve, now)

    async def _report_on(self, stream: LeaseStream) -> None:
        try:
            await stream.open()
            self._fail_open.answered()
            # answered before any interval is over: what is in hand does not dwindle in an outage
            await self._exchange(stream, everyone=True)
            next_tick = self._clock() + REPORT_S
            while True:
                if self._clock() >= next_tick:
                    next_tick = self._clock() + REPORT_S
                    for tenant in self._tenants.values():
                        tenant.account.tick()
                    await self._exchange(stream, everyone=True)
                    await self._pay(stream)
                else:
                    await self._exchange(stream, everyone=False)
                await self._woken(next_tick - self._clock())
        finally:
            stream.cancel()

    async def _pay(self, stream: LeaseStream) -> None:
        """Tells what was used without leases."""
        while debts := self._fail_open.debts(self._clock())[:MAX_REPORTED]:
            grants = await stream.exchange([debt.state() for debt in debts])
            for debt, grant in zip(debts, grants, strict=True):
                debt.answered(grant)

    async def _woken(self, wait_s: float) -> None:
        try:
            async with asyncio.timeout(max(wait_s, 0.0)):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _exchange(self, stream: LeaseStream, *, everyone: bool) -> None:
        """Reports those who are short, or everyone, a bounded number at a time.

        Requests that come meanwhile have a part of each message: they don't wait for all the rest.
        """
        self._wake.clear()
        due = list(self._tenants) if everyone else self._short()
        while due:
            part = dict.fromkeys(self._short()[: MAX_REPORTED // 2])
            for name in due:
                if len(part) == MAX_REPORTED:
                    break
                part[name] = None
            due = [name for name in due if name not in part]
            await self._report(stream, part)
        if self._short():
            self._wake.set()

    def _short(self) -> list[str]:
        """Tenants with requests that wait, or soon would."""
        now = self._clock()
        return [
            name
            for name, tenant in self._tenants.items()
            if tenant.waiters or tenant.account.is_low(now)
        ]

    async def _report(self, stream: LeaseStream, names: Iterable[str]) -> None:
        now = self._clock()
        found = [(name, self._tenants[name]) for name in names if name in self._tenants]
        states = [self._state(name, tenant, now) for name, tenant in found]
        if not states:
            return
        self._fail_open.asked(now)
        grants = await stream.exchange(states)
        self._fail_open.answered()
        for state, grant in zip(states, grants, strict=True):
            self._apply(state, grant, now)

    def _state(self, name: str, tenant: TenantQuota, now: float) -> State:
        account = tenant.account
        if account.granted != NOTHING and now >= account.usable_until:
            # what was left of it counts as spent by now; its requests run on without it
            account = tenant.account = new_account(name)
        state = account.report(tenant.waiting_costs(), now, tenant.limits)
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
            tenant.refuse_waiters(unknown, self._clock())
            return
        if grant.ended:
            tenant.begin_again()
            self._wake.set()
            return
        tenant.account.apply(grant, sent_at)
        tenant.last = grant
        tenant.admit_waiters(self._clock())
        tenant.refuse_waiters(grant.refused, self._clock())
        if tenant.waiters:
            self._wake.set()
