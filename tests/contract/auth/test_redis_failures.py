"""What becomes of leases when Redis is empty, frozen, full, foreign, or gone."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from infermesh.config import AuthConfig, ConfigError
from infermesh.errors import AuthUnavailable, from_rpc_error
from infermesh.security.posture import Security
from infermesh.v1 import auth_admin_service_pb2 as admin_pb
from infermesh.v1 import auth_service_pb2 as pb
from services.auth import metrics
from services.auth.redis_connection import RedisConnection, refuse_server, server_of
from services.auth.redis_script import SOURCE
from services.auth.service import AuthProcess
from tests.auth_process import Auth, TurnedClock, running_auth, start_auth
from tests.contract.auth.test_leases import Gateway
from tests.redis_server import RedisServer, running_redis

SECRET = "correct-horse"
NOON_S = 43_200


@pytest.fixture(scope="module")
def own_redis() -> Iterator[RedisServer]:
    """A server that tests of this module may do anything to, if they bring it back."""
    with running_redis() as server:
        yield server


@asynccontextmanager
async def limited(folder: Path, redis: RedisServer, **more: Any) -> AsyncIterator[Auth]:
    """Auth on a new database of each, with a tenant."""
    settings = {"redis_url": redis.new_database(), "redis_timeout_ms": 400, **more}
    async with running_auth(folder, f"sqlite:///{folder}/auth.sqlite3", **settings) as running:
        await running.tenant("acme", tokens_per_minute=1000, daily_tokens=5000)
        yield running


@pytest.fixture
async def auth(tmp_path: Path, own_redis: RedisServer) -> AsyncIterator[Auth]:
    async with limited(tmp_path, own_redis) as running:
        yield running


def failures(reason: str) -> float:
    return float(metrics.LEASE_STORE_FAILURES.labels(reason)._value.get())  # type: ignore[attr-defined]  # prometheus' own


async def refusal(auth: Auth, incarnation: str = "9") -> AuthUnavailable:
    """How a report is answered."""
    gateway = Gateway(auth.stub, "other", incarnation)
    with pytest.raises((grpc.aio.AioRpcError, AttributeError)):
        await gateway.report(needed=1)
    call: Any = gateway._call
    status = grpc.aio.AioRpcError(
        await call.code(),
        await call.initial_metadata(),
        await call.trailing_metadata(),
        await call.details(),
    )
    error = from_rpc_error(status)
    assert isinstance(error, AuthUnavailable)
    return error


def use(number: int, finished_s: float, tokens: int) -> pb.RecordUsageRequest:
    record = pb.UsageRecord(
        record_id=f"r{number}",
        tenant_id="acme",
        prompt_tokens=tokens - 1,
        completion_tokens=1,
        finished_unix_ms=int(finished_s * 1000),
    )
    return pb.RecordUsageRequest(record=record)


async def test_redis_that_comes_back_empty_begins_with_what_the_ledger_has(
    tmp_path: Path, own_redis: RedisServer
) -> None:
    clock = TurnedClock()
    clock.now += NOON_S - clock.now % 86_400  # an hour ago was the same day

    async def rows() -> AsyncIterator[pb.RecordUsageRequest]:
        yield use(1, clock.now, 400)
        yield use(2, clock.now - 3600, 4300)

    async with limited(tmp_path, own_redis, clock=clock) as auth:
        await auth.stub.RecordUsage(rows())
        one = Gateway(auth.stub, "one")
        grant = await one.report(needed=5000)
        # of the day 300 are left, of the minute 600
        assert grant.granted.tokens == 300
        own_redis.kill()
        own_redis.start()
        limits = pb.TenantLimits(daily_tokens=5000, monthly_tokens=4900)
        await auth.admin.UpdateTenant(admin_pb.UpdateTenantRequest(id="acme", limits=limits))
        two = Gateway(auth.stub, "two")
        grant = await two.report(needed=5000)
        assert grant.granted.tokens == 200, "beyond what the lost lease had, nothing of the budget"
        # the lease that Redis forgot is over once it was spent from
        again = Gateway(auth.stub, "one")
        assert (await again.report(spent=10)).ended
        for gateway in (one, two, again):
            gateway.close()


async def test_frozen_redis_is_given_up_in_time_and_keys_are_verified_all_the_while(
    auth: Auth, own_redis: RedisServer
) -> None:
    one = Gateway(auth.stub, "one")
    await one.report(needed=100)
    text, _ = await auth.key("acme")
    before = failures("timeout")
    own_redis.signal(signal.SIGSTOP)
    try:
        async with asyncio.timeout(10):
            error = await refusal(auth)
        assert error.retry_after_s
        answer = await auth.stub.Authenticate(pb.AuthenticateRequest(api_key=text))
        assert answer.principal.tenant_id == "acme"
    finally:
        own_redis.signal(signal.SIGCONT)
    assert failures("timeout") > before
    again = Gateway(auth.stub, "one")
    grant = await again.report(spent=60)
    assert not grant.ended
    assert (grant.granted.tokens, grant.remaining.tokens) == (100, 900)
    one.close()
    again.close()


async def test_full_redis_refuses_and_keeps_what_it_has(auth: Auth, own_redis: RedisServer) -> None:
    one = Gateway(auth.stub, "one")
    await one.report(needed=100)
    with own_redis.client(auth.config.redis_url) as client:
        client.config_set("maxmemory", "1")
        try:
            assert "out of memory" in (await refusal(auth)).message
        finally:
            client.config_set("maxmemory", "0")
    again = Gateway(auth.stub, "one")
    assert (await again.report(spent=100)).remaining.tokens == 900
    one.close()
    again.close()


async def test_demoted_redis_refuses_until_it_is_primary_again(
    auth: Auth, own_redis: RedisServer
) -> None:
    one = Gateway(auth.stub, "one")
    await one.report(needed=100)
    with own_redis.client(auth.config.redis_url) as client:
        # of a primary that does not exist: it takes no writes
        client.replicaof("127.0.0.1", "1")
        try:
            await refusal(auth)
        finally:
            client.replicaof("NO", "ONE")
    again = Gateway(auth.stub, "one")
    assert (await again.report(spent=100)).remaining.tokens == 900
    one.close()
    again.close()


async def test_lease_of_a_killed_auth_service_goes_on_at_another(
    auth: Auth, tmp_path: Path
) -> None:
    folder = tmp_path / "second"
    folder.mkdir()
    config = auth.config
    second = await start_auth(folder, config.database_url, redis_url=config.redis_url)
    one = Gateway(second.stub, "one")
    await one.report(needed=800)
    await second.stop()
    again = Gateway(auth.stub, "one")
    grant = await again.report(spent=700)
    assert (grant.granted.tokens, grant.remaining.tokens) == (800, 200)
    again.close()


async def test_limit_changed_at_one_auth_service_counts_at_another_within_a_second(
    auth: Auth, tmp_path: Path
) -> None:
    folder = tmp_path / "second"
    folder.mkdir()
    config = auth.config
    async with running_auth(folder, config.database_url, redis_url=config.redis_url) as second:
        one = Gateway(auth.stub, "one")
        assert (await one.report(needed=2000)).granted.tokens == 1000
        limits = pb.TenantLimits(tokens_per_minute=1500)
        await second.admin.UpdateTenant(admin_pb.UpdateTenantRequest(id="acme", limits=limits))
        async with asyncio.timeout(5):
            granted = 0
            while granted < 1500:  # a poll: the feed is read in its own time
                granted = (await one.report(needed=500)).granted.tokens
        one.close()


async def test_wrong_password_is_refused_and_never_shown(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with running_redis("--requirepass", SECRET) as server:
        good = RedisConnection(server.url(0, SECRET), 5.0, SOURCE)
        await good.check()
        assert SECRET not in good.name
        await good.close()
        wrong = RedisConnection(server.url(0, "wrong-pony"), 5.0, SOURCE)
        before = failures("wrong_password")
        with caplog.at_level(logging.DEBUG), pytest.raises(AuthUnavailable) as caught:
            await wrong.check()
        await wrong.close()
        assert failures("wrong_password") == before + 1
        assert "wrong password" in str(caught.value)
        assert "wrong-pony" not in str(caught.value) + caplog.text


async def test_auth_does_not_start_on_a_redis_that_may_evict(tmp_path: Path) -> None:
    with running_redis("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru") as server:
        with pytest.raises(ExceptionGroup) as caught:
            await start_auth(tmp_path, f"sqlite:///{tmp_path}/auth.sqlite3", redis_url=server.url())
        assert caught.group_contains(ConfigError, match="may evict.*noeviction")


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"redis_version": "5.0.7"}, "6.2 is the oldest"),
        ({"redis_version": "7.0.15", "cluster_enabled": 1}, "one primary"),
        (
            {"redis_version": "7.0.15", "maxmemory": 1, "maxmemory_policy": "volatile-ttl"},
            "noeviction",
        ),
    ],
)
def test_unfit_server_is_refused_by_what_it_says_of_itself(
    info: dict[str, Any], words: str
) -> None:
    refuse_server("redis://r", {"redis_version": "6.2.0"})
    with pytest.raises(ConfigError, match=words):
        refuse_server("redis://r", info)


@pytest.mark.parametrize("url", ["http://h", f"//:{SECRET}@h", f"redis://h:{SECRET}", "redis"])
def test_url_that_cannot_be_read_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="redis_url is no URL") as caught:
        server_of(url)
    assert SECRET not in str(caught.value)


def test_redis_beyond_this_machine_wants_tls(tmp_path: Path) -> None:
    database = {"database_url": f"sqlite:///{tmp_path}/auth.sqlite3"}
    url = f"redis://:{SECRET}@redis.example.org:6379/0"
    with pytest.raises(ConfigError, match=r"auth\.redis_url .*rediss://") as caught:
        AuthProcess(AuthConfig(redis_url=url, **database))
    assert SECRET not in str(caught.value)
    AuthProcess(AuthConfig(redis_url=url.replace("redis:", "rediss:"), **database))
    allowed = Security(allow=frozenset({"plaintext"}))
    AuthProcess(AuthConfig(redis_url=url, **database), security=allowed)
