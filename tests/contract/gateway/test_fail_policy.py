"""Limited tenants while Redis is frozen, and while one auth service of two is gone."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import openai
import pytest

from gateway.auth.metrics import FAIL_OPEN, OPEN_ADMISSIONS
from infermesh.v1 import auth_admin_service_pb2 as admin_pb
from infermesh.v1 import auth_service_pb2 as pb
from tests.auth_process import Auth, TurnedClock, running_auth
from tests.contract.auth.test_leases import Gateway
from tests.gateway_process import Edge
from tests.keyed_gateway import ask, keyed_gateway, refused, settled
from tests.redis_server import RedisServer, running_redis

LIMIT = 400


@pytest.fixture(scope="module")
def own_redis() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@asynccontextmanager
async def two_of_each(
    folder: Path, redis: RedisServer, **settings: object
) -> AsyncIterator[tuple[list[Auth], list[Edge]]]:
    """Two auth services on one database and one Redis, two gateways that know both."""
    store = {
        "database_url": f"sqlite:///{folder}/auth.sqlite3",
        "redis_url": redis.new_database(),
        "redis_timeout_ms": 300,
    }
    clock = TurnedClock()  # the minute stands still, however slow the machine is
    async with AsyncExitStack() as stack:
        auths: list[Auth] = []
        for index in range(2):
            sub = folder / f"a{index}"
            sub.mkdir()
            auth = running_auth(sub, clock=clock, **store)
            auths.append(await stack.enter_async_context(auth))
        edges = [
            await stack.enter_async_context(keyed_gateway(folder / f"g{index}", *auths, **settings))
            for index in range(2)
        ]
        yield auths, edges


async def burst(edges: list[Edge], key: str, num_requests: int) -> tuple[int, list[int]]:
    """Tokens that were used, and how the others were refused."""
    used = 0
    errors: list[openai.APIStatusError] = []

    async def one(index: int) -> None:
        nonlocal used
        try:
            answer = await ask(edges[index % len(edges)], key, max_tokens=8 + index % 9)
            used += answer.usage.total_tokens
        except openai.APIStatusError as error:
            errors.append(error)

    await asyncio.gather(*(one(index) for index in range(num_requests)))
    assert all(int(error.response.headers["retry-after"]) >= 1 for error in errors)
    return used, [error.status_code for error in errors]


def opened() -> float:
    return float(OPEN_ADMISSIONS._value.get())  # type: ignore[attr-defined]  # prometheus' own


async def test_nothing_is_admitted_beyond_the_limit_when_an_auth_service_goes(
    tmp_path: Path, own_redis: RedisServer
) -> None:
    async with two_of_each(tmp_path, own_redis) as (auths, edges):
        await auths[0].tenant("acme", tokens_per_minute=1000)
        key, _ = await auths[0].key("acme")
        used, codes = await burst(edges, key, 20)
        assert codes == []
        await auths[0].stop()
        more, codes = await burst(edges, key, 80)
        assert set(codes) == {429}, "the other one grants, and says no"
        assert 1000 - 2 * 60 <= used + more <= 1000
        totals = await settled(auths[1], 100 - len(codes))
        assert sum(t.prompt_tokens + t.completion_tokens for t in totals) == used + more


async def test_closed_policy_answers_503_when_redis_is_frozen(
    tmp_path: Path, own_redis: RedisServer
) -> None:
    async with two_of_each(tmp_path, own_redis) as (auths, edges):
        await auths[0].tenant("acme", tokens_per_minute=LIMIT)
        key, _ = await auths[0].key("acme")
        own_redis.signal(signal.SIGSTOP)
        try:
            used, codes = await burst(edges, key, 4)
        finally:
            own_redis.signal(signal.SIGCONT)
        assert (used, codes) == (0, [503] * 4)


async def test_open_policy_admits_a_limit_per_gateway_at_most_and_tells_it_afterwards(
    tmp_path: Path, own_redis: RedisServer
) -> None:
    settings = {"auth_fail_policy": "open", "auth_fail_open_max_s": 600.0}
    async with two_of_each(tmp_path, own_redis, **settings) as (auths, edges):
        await auths[0].tenant("acme", tokens_per_minute=LIMIT)
        await auths[0].tenant("poor", tokens_per_minute=LIMIT, daily_tokens=10_000)
        key, _ = await auths[0].key("acme")
        poor, _ = await auths[0].key("poor")
        used, codes = await burst(edges, key, 4)
        assert codes == []
        before = opened()
        own_redis.signal(signal.SIGSTOP)
        try:
            more, codes = await burst(edges, key, 100)
            assert set(codes) == {429}
            assert FAIL_OPEN._value.get() == 1  # type: ignore[attr-defined]  # prometheus' own
            num_open = opened() - before
            # the limit by leases, and once more by each of two gateways
            assert LIMIT < used + more <= 3 * LIMIT
            with pytest.raises(openai.AuthenticationError):
                await ask(edges[0], "im-unknown-key")
            beyond = await burst(edges, poor, 2)
            assert beyond == (0, [503, 503]), "a budget is never open"
        finally:
            own_redis.signal(signal.SIGCONT)
        assert num_open > 0
        totals = await settled(auths[0], 104 - len(codes), "acme")
        assert sum(t.prompt_tokens + t.completion_tokens for t in totals) == used + more
        await counted(auths[0], "acme", used + more)
        assert FAIL_OPEN._value.get() == 0  # type: ignore[attr-defined]  # prometheus' own


async def counted(auth: Auth, tenant: str, num_tokens: int) -> None:
    """Until the quota of today knows of so many, used with leases or without."""
    limits = pb.TenantLimits(daily_tokens=num_tokens + 300)
    await auth.admin.UpdateTenant(admin_pb.UpdateTenantRequest(id=tenant, limits=limits))
    gateway = Gateway(auth.stub, "observer")
    async with asyncio.timeout(20):
        remaining = num_tokens
        while remaining > 300:  # a poll: gateways tell it in their own time
            remaining = (await gateway.report(tenant)).remaining.tokens
    gateway.close()


async def test_open_policy_admits_known_keys_alone_when_auth_is_gone(
    tmp_path: Path, auth: Auth
) -> None:
    await auth.tenant("limited", requests_per_minute=20, max_concurrency=10)
    key, _ = await auth.key("limited")
    unknown, _ = await auth.key("limited")
    async with keyed_gateway(tmp_path / "g", auth, auth_fail_policy="open") as edge:
        await ask(edge, key)
        await auth.stop()
        before = opened()
        refusal = await refused(edge, key, 60.0)
        assert refusal.status_code == 429
        assert int(refusal.response.headers["retry-after"]) >= 1
        assert opened() - before == 20, "of its own, beside what the lease had"
        with pytest.raises(openai.InternalServerError) as caught:
            await ask(edge, unknown)
        assert caught.value.status_code == 503
