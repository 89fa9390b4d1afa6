"""Whatever gateways, the network and time do, Redis in the auth service's place: the same limits
hold. The rules and invariants are those of tests/unit/auth/test_lease_machine.py.
"""

import itertools

import redis
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from gateway.auth.account import Account, Grant
from infermesh.quota import NOTHING, Amounts
from services.auth import quota, redis_script
from services.auth.redis_script import Seed, Times
from services.auth.values import Gateway, LeaseId, Report, TenantId
from tests.redis_server import RedisServer
from tests.unit.auth.test_lease_machine import LEASE_S, LIMITS, MAX_REQUEST_S, Leases

GATEWAY = Gateway("one", "1")
NUMBERS = itertools.count()


class InRedis:
    """The machine's service, by the script."""

    def __init__(self, client: "redis.Redis") -> None:
        self._script = client.register_script(redis_script.SOURCE)
        self._tenant = TenantId(f"machine-{next(NUMBERS)}")

    def report(self, account: Account, waiting: list[Amounts], now: float) -> Grant:
        state = account.report(waiting, now, LIMITS)
        report = Report(
            LeaseId(state.lease_id),
            self._tenant,
            state.spent,
            state.returned,
            state.needed,
            state.wanted,
            state.least_needed,
        )
        times = Times(LEASE_S, MAX_REQUEST_S, now)
        seed = (now, Seed({}, 0, 0))
        ask = redis_script.report(GATEWAY, report, LIMITS, times, is_listed=True, seed=seed)
        key = redis_script.tenant_key(self._tenant)
        found = redis_script.outcome(self._script(keys=[key], args=[ask]))
        if found.kind == "ended":
            return Grant(state.lease_id, NOTHING, 0.0, True, None, NOTHING, 0.0, 0.0)
        left = quota.room(LIMITS, found.tally, found.open)
        return Grant(state.lease_id, found.granted, LEASE_S, False, None, left, 0.0, 0.0)


def test_no_limit_is_passed_whatever_happens(redis_server: RedisServer) -> None:
    with redis_server.client(redis_server.new_database()) as client:

        class Machine(Leases):
            def __init__(self) -> None:
                super().__init__()
                self.service = InRedis(client)  # type: ignore[assignment]  # in its place

        run_state_machine_as_test(  # type: ignore[no-untyped-call]  # hypothesis'
            Machine, settings=settings(max_examples=30, stateful_step_count=40, deadline=None)
        )
