"""The database's leases and Redis's, side by side: every answer of one is the other's.

The script in Redis decides what `services.auth.quota` decides, in another language.
"""

import asyncio
import datetime
import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from infermesh.quota import NOTHING, Amounts, Limits
from services.auth import quota
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
DAY_S = 86_400
NUM_GATEWAYS, NUM_TENANTS = 3, 2
NUMBERS = itertools.count()
# Small, so that what is left of them, and the part of it that a wish gets, decides every answer.
# Lua counts in doubles, exact up to 2^53: no limit is above 10^15.
LIMITS = st.sampled_from(
    [
        Limits(7, 100, 4, 300, 10**15),
        Limits(15, 200, 9, 500, 900),
        Limits(tokens_per_minute=100, max_concurrency=6),
        Limits(max_concurrency=5, requests_per_minute=9),
        Limits(daily_tokens=150, monthly_tokens=200),
        Limits(monthly_tokens=400, max_concurrency=8),
        Limits(0, 0, 0, 0, 0),
        Limits(),
    ]
)
# shortly before a midnight: of a day, of a month, of a year, of leap days and missing ones
STARTS = st.sampled_from(
    [
        datetime.datetime(*day, 23, 59, 20, tzinfo=datetime.UTC).timestamp()
        for day in (
            (2026, 6, 14),
            (2026, 4, 30),
            (2026, 12, 31),
            (2027, 2, 28),
            (2028, 2, 28),
            (2028, 2, 29),
        )
    ]
)
# around the ends of a lease, of its slots and of a minute
WAITS = st.sampled_from([0.25, 8.0, 19.75, 20.0, 20.0, 20.25, 20.25, 29.75, 30.0, 50.0, 59.5, 61.0])
# days and months, and a clock that is put right, by as much as instances differ and by more
JUMPS = st.sampled_from(
    [60.0, float(DAY_S), 31.0 * DAY_S, -59.75, -60.0, -60.25, -61.0, -3600.0, -1.5 * DAY_S]
)
NEEDS = st.builds(
    Amounts, st.integers(0, 2), st.sampled_from([0, 1, 25, 60, 10**12]), st.integers(0, 2)
)
WISHES = st.builds(
    Amounts, st.integers(0, 5), st.sampled_from([0, 25, 60, 10**12]), st.integers(0, 5)
)
SHARES = st.sampled_from([0.0, 0.0, 0.4, 1.0, 1.3])


@dataclass(frozen=True)
class Ask:
    """A report as a gateway makes one.

    Attributes:
        by: the gateway that sends it; None: the one that has the lease.
        spends, returns: the parts of what is open that are spent and returned.
        when: now; again, as it was; late: after one that was made later; early: before any grant.
    """

    tenant: int
    gateway: int
    needed: Amounts
    wanted: Amounts
    spends: float
    returns: Amounts
    when: str
    closing: bool
    by: int | None


ASKS = st.builds(
    Ask,
    st.integers(0, NUM_TENANTS - 1),
    st.integers(0, NUM_GATEWAYS - 1),
    NEEDS,
    WISHES,
    SHARES,
    st.sampled_from([NOTHING, Amounts(slots=1), Amounts(1, 10, 2), Amounts(0, 60, 9)]),
    st.sampled_from(["now"] * 12 + ["again", "late", "early"]),
    st.sampled_from([False] * 11 + [True]),
    st.sampled_from([None] * 19 + [0]),
)
RESTARTS = st.integers(0, NUM_GATEWAYS - 1)
STEPS = st.lists(
    # one_of takes no weights: it counts a strategy once
    st.sampled_from([*[ASKS] * 11, *[WAITS] * 3, JUMPS, RESTARTS]).flatmap(lambda kind: kind),
    min_size=40,
    max_size=60,
)


@dataclass
class Told:
    """A lease: what its gateway has told of it, and what of it is open by that."""

    lease: LeaseId
    spent: Amounts = NOTHING
    returned: Amounts = NOTHING
    granted: Amounts = NOTHING
    before: tuple[Amounts, Amounts] = (NOTHING, NOTHING)

    def tell(self, ask: Ask) -> tuple[Amounts, Amounts]:
        """Totals of what was spent and returned."""
        if ask.when == "late":
            return self.before
        if ask.when == "early":
            return self.spent + Amounts(tokens=1), self.returned
        if ask.when == "now":
            self.before = self.spent, self.returned
            held = (self.granted - self.spent - self.returned).at_least(NOTHING)
            self.spent += Amounts(
                round(held.requests * ask.spends), round(held.tokens * ask.spends)
            )
            self.returned += ask.returns.at_most(held)
        return self.spent, self.returned


class Both:
    """Tenants in two stores; the clock is theirs together."""

    def __init__(self, stores: tuple[LeaseStore, LeaseStore], tenants: list[TenantId]) -> None:
        self._stores = stores
        self._tenants = tenants
        name = f"{next(NUMBERS)}"
        self._gateways = [Gateway(f"{name}-{index}", "0") for index in range(NUM_GATEWAYS)]
        self._told: dict[tuple[int, int], Told] = {}
        for index in range(NUM_GATEWAYS):
            self._forget(index)

    async def report(self, ask: Ask) -> None:
        place = ask.tenant, ask.gateway
        told = self._told[place]
        spent, returned = told.tell(ask)
        report = Report(
            told.lease,
            self._tenants[ask.tenant],
            spent,
            returned,
            ask.needed,
            ask.wanted,
            least_needed=ask.needed,
            closing=ask.closing,
        )
        sender = self._gateways[ask.gateway if ask.by is None else ask.by]
        ours, theirs = [await store.report(sender, report) for store in self._stores]
        assert facts(ours) == facts(theirs)
        told.granted = ours.granted
        if ours.ended:
            self._told[place] = new_lease()

    async def restart(self, index: int) -> None:
        before = self._gateways[index]
        gateway = replace(before, incarnation=str(int(before.incarnation) + 1))
        self._gateways[index] = gateway
        self._forget(index)
        for store in self._stores:
            await store.hello(gateway)

    def _forget(self, gateway: int) -> None:
        for tenant in range(NUM_TENANTS):
            self._told[tenant, gateway] = new_lease()


def new_lease() -> Told:
    # ids are the table's own over all tenants
    return Told(LeaseId(f"lease-{next(NUMBERS)}"))


def facts(grant: Grant) -> tuple[object, ...]:
    refused = grant.refused and (type(grant.refused), str(grant.refused))
    after = grant.refused and grant.refused.retry_after_s
    return (replace(grant, refused=None), refused, after)


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

        async def play(limits: list[Limits], start: float, steps: list[Ask | float | int]) -> None:
            clock.now = start
            created = [
                await tenants.create(f"t{next(NUMBERS)}", "", each, Policy()) for each in limits
            ]
            both = Both(stores, [tenant.id for tenant in created])
            for step in steps:
                match step:
                    case Ask():
                        await both.report(step)
                    case int(index):
                        await both.restart(index)
                    case float(seconds):
                        clock.now += seconds

        @settings(
            max_examples=10,
            deadline=None,
            # shrinking a database's history takes minutes
            phases=(Phase.generate,),
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )
        @given(st.lists(LIMITS, min_size=NUM_TENANTS, max_size=NUM_TENANTS), STARTS, STEPS)
        def agree(limits: list[Limits], start: float, steps: list[Ask | float | int]) -> None:
            runner.run(play(limits, start, steps))

        try:
            agree()
        finally:
            runner.run(redis.close())
            runner.run(database.close())


def test_days_and_months_of_the_script_are_those_of_utc(redis_server: RedisServer) -> None:
    found = (
        re.search(r"^local DAY_S = .*?$", SOURCE, re.M),
        re.search(r"^local function calendar\(.*?^end$", SOURCE, re.M | re.S),
    )
    assert all(found), "the script has a calendar of its own"
    parts = [match.group() for match in found if match]
    script = "\n".join(
        [
            *parts,
            "local days = {}",
            "for day = 0, tonumber(ARGV[1]) - 1 do",
            "  local first, month = calendar(day * DAY_S)",
            "  local last, same = calendar(day * DAY_S + DAY_S - 1)",
            "  days[day + 1] = {first, month, last, same}",
            "end",
            "return days",
        ]
    )
    num_days = 132 * 366  # beyond 2100, which has no leap day
    with redis_server.client(redis_server.new_database()) as client:
        days = client.eval(script, 0, str(num_days))
    for day, got in enumerate(days):
        year, month = map(int, quota.calendar(day * DAY_S)[1].split("-"))
        number = 12 * year + month - 1
        assert got == [day, number, day, number]
