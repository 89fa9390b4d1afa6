"""The database's leases and Redis's, side by side: every answer of one is the other's.

The script in Redis decides what `services.auth.quota` decides, in another language.
"""

import asyncio
import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infermesh.quota import NOTHING, Amounts, Limits
from services.auth.changes import ChangeFeed
from services.auth.database import Database
from services.auth.lease_store import LeaseStore
from services.auth.leases import Leases
from services.auth.ledger_sums import LedgerSums
from services.auth.limits import KnownLimits
from services.auth.migrate import migrate
from services.auth.redis_connection import RedisConnection
from services.auth.redis_leases import RedisLeases
from services.auth.redis_script import SOURCE
from services.auth.tenants import Tenants
from services.auth.values import Gateway, Grant, LeaseId, Policy, Report, TenantId
from tests.auth_process import TurnedClock
from tests.redis_server import RedisServer

LEASE_S, MAX_REQUEST_S = 20.0, 30.0
NUMBERS = itertools.count()
LIMITS = st.sampled_from(
    [
        Limits(7, 100, 4, 300, 10**15),
        Limits(tokens_per_minute=100),
        Limits(max_concurrency=3, requests_per_minute=5),
        Limits(daily_tokens=150, monthly_tokens=200),
        Limits(0, 0, 0, 0, 0),
        Limits(),
    ]
)
# Lua counts in doubles, exact up to 2^53: no limit is above 10^15.
AMOUNTS = st.builds(
    Amounts, st.integers(0, 3), st.sampled_from([0, 1, 25, 60, 10**12]), st.integers(0, 3)
)
# around the ends of a lease and of a minute, a day, a month; and a clock that is put right
WAITS = st.sampled_from([0.25, 1.0, 8.0, 18.5, 21.5, 59.5, 61.0, 86_400.0, 31 * 86_400.0, -3600.0])


@dataclass
class Told:
    """A gateway, and what it has told of its lease so far."""

    gateway: Gateway
    lease: str
    spent: Amounts = NOTHING
    returned: Amounts = NOTHING


@dataclass
class Both:
    """One tenant in two stores; the clock is theirs together."""

    stores: tuple[LeaseStore, LeaseStore]
    clock: TurnedClock
    tenant: TenantId
    told: list[Told] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.told = [self._new(index, 0) for index in range(3)]

    def _new(self, index: int, run: int) -> Told:
        # ids are the table's own over all tenants
        return Told(Gateway(f"{self.tenant}-{index}", str(run)), f"{self.tenant}-{next(NUMBERS)}")

    async def report(self, index: int, more: Report, again: bool) -> None:
        told = self.told[index]
        if not again:
            told.spent += replace(more.spent, slots=0)
            told.returned += more.returned
        report = replace(
            more,
            lease_id=LeaseId(told.lease),
            tenant_id=self.tenant,
            spent=told.spent,
            returned=told.returned,
            least_needed=more.needed,
        )
        ours, theirs = [await store.report(told.gateway, report) for store in self.stores]
        assert facts(ours) == facts(theirs)
        if ours.ended:
            self.told[index] = replace(self._new(index, 0), gateway=told.gateway)

    async def restart(self, index: int) -> None:
        run = int(self.told[index].gateway.incarnation) + 1
        self.told[index] = self._new(index, run)
        for store in self.stores:
            await store.hello(self.told[index].gateway)


def facts(grant: Grant) -> tuple[object, ...]:
    refused = grant.refused and (type(grant.refused), str(grant.refused))
    after = grant.refused and grant.refused.retry_after_s
    return (replace(grant, refused=None), refused, after)


REPORTS = st.builds(
    Report,
    st.just(LeaseId("")),
    st.just(TenantId("")),
    spent=AMOUNTS,
    returned=st.one_of(st.just(NOTHING), AMOUNTS),
    needed=AMOUNTS,
    wanted=AMOUNTS,
    closing=st.sampled_from([False, False, False, True]),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("report"), st.integers(0, 2), REPORTS, st.booleans()),
        st.tuples(st.just("restart"), st.integers(0, 2)),
        st.tuples(st.just("wait"), WAITS),
    ),
    max_size=25,
)


def test_redis_answers_every_report_as_the_database_does(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    with asyncio.Runner() as runner:
        clock = TurnedClock()
        database = Database(f"sqlite:///{tmp_path / 'auth.sqlite3'}")
        redis = RedisConnection(redis_server.new_database(), 30.0, SOURCE)

        async def prepare() -> tuple[Tenants, tuple[LeaseStore, LeaseStore]]:
            await migrate(database)
            feed = ChangeFeed(database, clock)
            await feed.start()
            limits = KnownLimits(database, feed)
            times = (LEASE_S, MAX_REQUEST_S, clock)
            in_redis = RedisLeases(redis, limits, LedgerSums(database), *times)
            stores = (Leases(database, *times), in_redis)
            return Tenants(database, clock, limits.forget), stores

        tenants, stores = runner.run(prepare())

        async def play(limits: Limits, steps: list[tuple[object, ...]]) -> None:
            tenant = await tenants.create(f"t{next(NUMBERS)}", "", limits, Policy())
            both = Both(stores, clock, tenant.id)
            for step in steps:
                match step:
                    case ("report", int(index), Report() as more, bool(again)):
                        await both.report(index, more, again)
                    case ("restart", int(index)):
                        await both.restart(index)
                    case ("wait", float(seconds)):
                        clock.now += seconds

        @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(LIMITS, STEPS)
        def agree(limits: Limits, steps: list[tuple[object, ...]]) -> None:
            runner.run(play(limits, steps))

        try:
            agree()
        finally:
            runner.run(redis.close())
            runner.run(database.close())
