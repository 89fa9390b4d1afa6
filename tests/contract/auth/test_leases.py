"""Leases through the real service: grants keep within every limit, whatever gateways do."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from infermesh import rpc
from infermesh.v1 import auth_admin_service_pb2 as admin_pb
from infermesh.v1 import auth_service_pb2 as pb
from infermesh.v1 import errors_pb2
from infermesh.v1.auth_service_pb2_grpc import AuthServiceStub
from tests.auth_process import Auth, TurnedClock, running_auth

LEASE_S = 20.0


@pytest.fixture
def clock() -> TurnedClock:
    return TurnedClock()


@pytest.fixture
async def auth(
    tmp_path: Path, lease_store: dict[str, str], clock: TurnedClock
) -> AsyncIterator[Auth]:
    settings = {"lease_s": LEASE_S, "max_request_s": 100.0}
    async with running_auth(tmp_path, **lease_store, clock=clock, **settings) as running:
        await running.tenant("acme", tokens_per_minute=1000)
        yield running


class Gateway:
    """A gateway that says what a test tells it to."""

    def __init__(self, stub: Any, name: str, incarnation: str = "1") -> None:
        self._call = stub.Lease()
        self._hello = pb.LeaseHello(gateway_id=name, incarnation=incarnation)
        self._lease_id = f"{name}-{incarnation}"
        self._started = False

    async def greet(self) -> None:
        """Says who it is, once."""
        if not self._started:
            self._started = True
            await self._call.write(pb.LeaseRequest(hello=self._hello))
            # an answer to nothing: the hello was taken in
            await self._call.write(pb.LeaseRequest(report=pb.LeaseReport()))
            await self._call.read()

    async def report(self, tenant: str = "acme", **state: Any) -> pb.LeaseGrant:
        """One report; `needed=5` is tokens."""
        await self.greet()
        for name, value in state.items():
            if isinstance(value, int) and not isinstance(value, bool):
                state[name] = pb.QuotaAmounts(tokens=value)
        state.setdefault("least_needed", state.get("needed"))
        one = pb.LeaseState(lease_id=self._lease_id, tenant_id=tenant, **state)
        await self._call.write(pb.LeaseRequest(report=pb.LeaseReport(leases=[one])))
        async with asyncio.timeout(10):
            return (await self._call.read()).grants[0]

    def close(self) -> None:
        self._call.cancel()


async def test_grant_stops_at_the_limit_and_says_when_to_come_back(
    auth: Auth, clock: TurnedClock
) -> None:
    one, two = Gateway(auth.stub, "one"), Gateway(auth.stub, "two")
    assert (await one.report(needed=700)).granted.tokens == 700
    grant = await two.report(needed=700)
    assert grant.granted.tokens == 300
    assert grant.refused.reason == errors_pb2.ERROR_REASON_RATE_LIMIT_EXCEEDED
    # running requests may free what they hold at any time
    assert grant.refused.retry_after.seconds == 1
    await one.report(spent=700)
    clock.now += 10
    # what was reported spent 10 seconds ago leaves the window in 51: its cell is a whole second
    grant = await two.report(spent=300, needed=100)
    assert grant.granted.tokens == 300
    assert grant.refused.retry_after.seconds == 51
    for _ in range(3):
        clock.now += 17
        grant = await two.report()
    assert (await two.report(needed=100)).granted.tokens == 400
    one.close()
    two.close()


async def test_restarted_gateway_ends_every_lease_of_its_earlier_run(auth: Auth) -> None:
    earlier = [Gateway(auth.stub, "one"), Gateway(auth.stub, "one")]
    for number, gateway in enumerate(earlier):
        gateway._lease_id = f"earlier-{number}"
        await gateway.report(needed=400)
    restarted = Gateway(auth.stub, "one", incarnation="2")
    other = Gateway(auth.stub, "two")
    await restarted.report()
    # what both had unspent is settled with them; nothing of it is open any more
    assert (await other.report(needed=1000)).granted.tokens == 200
    ended = [(await gateway.report(spent=1)).ended for gateway in earlier]
    assert ended == [True, True]
    for gateway in (*earlier, restarted, other):
        gateway.close()


async def test_returned_quota_can_be_granted_again(auth: Auth) -> None:
    one, two = Gateway(auth.stub, "one"), Gateway(auth.stub, "two")
    await one.report(needed=1000)
    await one.report(spent=100, returned=900)
    assert (await two.report(needed=1000)).granted.tokens == 900
    one.close()
    two.close()


async def test_report_that_comes_twice_counts_once(auth: Auth) -> None:
    gateway = Gateway(auth.stub, "one")
    await gateway.report(needed=1000)
    for _ in range(3):
        grant = await gateway.report(spent=400, returned=500)
    assert grant.remaining.tokens == 500
    assert grant.granted.tokens == 1000
    gateway.close()


async def test_expired_lease_counts_as_spent_for_a_minute(auth: Auth, clock: TurnedClock) -> None:
    one, two = Gateway(auth.stub, "one"), Gateway(auth.stub, "two")
    await one.report(needed=800)
    await one.report(spent=100)
    clock.now += LEASE_S
    assert (await two.report(needed=1000)).granted.tokens == 200
    assert (await one.report(spent=500)).ended
    assert (await two.report(needed=1000, spent=200)).granted.tokens == 200
    for _ in range(4):
        clock.now += 15.25
        grant = await two.report()
    # the lost lease ended, and the other's tokens were spent, more than a minute ago
    assert (grant.remaining.tokens, grant.granted.tokens) == (1000, 200)
    one.close()
    two.close()


async def test_lease_goes_on_over_a_new_stream_and_a_restart(
    tmp_path: Path, lease_store: dict[str, str], clock: TurnedClock
) -> None:
    async with running_auth(tmp_path, **lease_store, clock=clock) as auth:
        await auth.tenant("acme", tokens_per_minute=1000)
        gateway = Gateway(auth.stub, "one")
        await gateway.report(needed=800)
        gateway.close()
    async with running_auth(tmp_path, **lease_store, clock=clock) as auth:
        gateway = Gateway(auth.stub, "one")
        grant = await gateway.report(spent=700)
        assert not grant.ended
        assert (grant.granted.tokens, grant.remaining.tokens) == (800, 200)
        gateway.close()


async def test_new_incarnation_of_a_gateway_ends_the_leases_of_the_old_one(auth: Auth) -> None:
    await auth.tenant("busy", max_concurrency=4, daily_tokens=1000)
    old = Gateway(auth.stub, "one", "1")
    need = pb.QuotaAmounts(tokens=600, slots=4)
    await old.report("busy", needed=need)
    other = Gateway(auth.stub, "two")
    assert (await other.report("busy", needed=need)).granted == pb.QuotaAmounts(tokens=400)
    new = Gateway(auth.stub, "one", "2")
    # its slots are free, its tokens are spent
    assert (await new.report("busy", needed=need)).granted == pb.QuotaAmounts(slots=4)
    for gateway in (old, other, new):
        gateway.close()


@pytest.mark.parametrize("lease_store", ["sqlite", "redis"], indirect=True)
async def test_new_incarnation_ends_all_of_the_old_leases(auth: Auth) -> None:
    """Three, from streams that were open side by side."""
    await auth.tenant("busy", max_concurrency=4)
    old = [Gateway(auth.stub, "one", incarnation) for incarnation in "123"]
    for gateway in old:
        await gateway.greet()
    need = pb.QuotaAmounts(slots=1)
    for gateway in old:
        assert (await gateway.report("busy", needed=need)).granted == need
    new = Gateway(auth.stub, "one", "4")
    need = pb.QuotaAmounts(slots=4)
    assert (await new.report("busy", needed=need)).granted == need
    for gateway in (*old, new):
        gateway.close()


async def test_slots_of_a_lost_gateway_are_kept_while_its_requests_may_run(
    auth: Auth, clock: TurnedClock
) -> None:
    await auth.tenant("busy", max_concurrency=4)
    one, two = Gateway(auth.stub, "one"), Gateway(auth.stub, "two")
    need = pb.QuotaAmounts(slots=3)
    await one.report("busy", needed=need)
    clock.now += LEASE_S + 50
    grant = await two.report("busy", needed=need)
    assert grant.granted.slots == 1
    assert "requests at once" in grant.refused.message
    clock.now += 51
    await two.report("busy")
    two = Gateway(auth.stub, "two", "2")
    assert (await two.report("busy", needed=need)).granted.slots == 3
    one.close()
    two.close()


async def test_daily_budget_is_insufficient_quota_until_midnight(
    auth: Auth, clock: TurnedClock
) -> None:
    await auth.tenant("daily", daily_tokens=100)
    clock.now = float(int(clock.now) // 86_400 * 86_400 + 86_400 - 600)
    gateway = Gateway(auth.stub, "one")
    await gateway.report("daily", needed=100)
    grant = await gateway.report("daily", spent=100, needed=10)
    assert grant.refused.reason == errors_pb2.ERROR_REASON_INSUFFICIENT_QUOTA
    assert grant.refused.retry_after.seconds == 600
    clock.now += 600
    gateway = Gateway(auth.stub, "one", "2")
    assert (await gateway.report("daily", needed=10)).granted.tokens == 10
    gateway.close()


async def test_changed_limit_counts_for_the_next_grant(auth: Auth) -> None:
    gateway = Gateway(auth.stub, "one")
    await gateway.report(needed=100)
    limits = pb.TenantLimits(tokens_per_minute=150)
    await auth.admin.UpdateTenant(admin_pb.UpdateTenantRequest(id="acme", limits=limits))
    assert (await gateway.report(needed=100)).granted.tokens == 150
    gateway.close()


async def test_wish_gets_a_part_of_what_is_left(auth: Auth) -> None:
    gateway = Gateway(auth.stub, "one")
    assert (await gateway.report(needed=200, wanted=1000)).granted.tokens == 400
    gateway.close()


async def test_many_gateways_at_once_are_granted_no_more_than_the_limit(
    auth: Auth, tmp_path: Path, lease_store: dict[str, str], clock: TurnedClock
) -> None:
    folder = tmp_path / "second"
    folder.mkdir()
    async with running_auth(folder, **lease_store, clock=clock) as second:
        gateways = [
            Gateway(service.stub, f"{name}-{index}")
            for index in range(8)
            for name, service in (("a", auth), ("b", second))
        ]
        grants = await asyncio.gather(
            *(gateway.report(needed=90, wanted=500) for gateway in gateways)
        )
        assert sum(grant.granted.tokens for grant in grants) == 1000
        for gateway in gateways:
            gateway.close()


async def test_report_before_hello_breaks_the_call(auth: Auth) -> None:
    async with rpc.channel(auth.config.address) as channel:
        call: Any = AuthServiceStub(channel).Lease()
        await call.write(pb.LeaseRequest(report=pb.LeaseReport()))
        assert "hello" in await call.details()


async def spent_while_the_clock_was_ahead(auth: Auth, clock: TurnedClock) -> list[Gateway]:
    """One that is lost with 200 tokens in hand, and one that has spent 800; the clock is right."""
    clock.now += 3600
    lost, one = Gateway(auth.stub, "lost"), Gateway(auth.stub, "one")
    await lost.report(needed=200)
    await one.report(needed=800)
    await one.report(spent=800)
    clock.now -= 3600
    return [lost, one]


async def test_windows_go_on_when_a_clock_that_was_an_hour_ahead_is_put_right(
    auth: Auth, clock: TurnedClock
) -> None:
    lost, one = await spent_while_the_clock_was_ahead(auth, clock)
    assert (await one.report(spent=800, needed=800)).granted.tokens == 800
    for _ in range(6):  # the lost gateway's lease ends after 20 s; 61 later all is forgotten
        clock.now += 17
        await one.report(spent=800)
    assert (await one.report(spent=800, needed=1000)).granted.tokens == 1800
    lost.close()
    one.close()


async def test_lost_lease_ends_when_a_gateway_restarts_right_after_a_clock_is_put_right(
    auth: Auth, clock: TurnedClock
) -> None:
    lost, one = await spent_while_the_clock_was_ahead(auth, clock)
    again = Gateway(auth.stub, "one", "2")  # begins with a hello
    for _ in range(9):
        await again.report()
        clock.now += 17
    assert (await again.report(needed=1000)).granted.tokens == 1000
    for gateway in (lost, one, again):
        gateway.close()
