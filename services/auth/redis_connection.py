"""The connection to Redis: one script, a deadline per call, and its failures as one error each.

Owns the pool and what must be true of a server before quota is kept there. Knows no quota.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast
from urllib.parse import urlsplit

import redis.asyncio as aioredis
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from infermesh.config import ConfigError
from infermesh.config_fields import masked
from infermesh.errors import AuthUnavailable
from infermesh.telemetry import logs
from services.auth import metrics

_log = logs.get(__name__)
_SCHEMES = ("redis", "rediss", "unix")
_OLDEST = (6, 2)
_RETRY_AFTER_S = 1.0
_POOL_SIZE = 16
# What a call can fail with, most telling first; a label of the counter.
_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (exceptions.AuthenticationError, "wrong_password"),
    (exceptions.AuthorizationError, "wrong_password"),
    (exceptions.NoPermissionError, "no_permission"),
    (exceptions.OutOfMemoryError, "out_of_memory"),
    (exceptions.ReadOnlyError, "read_only"),
    (exceptions.BusyLoadingError, "loading"),
    (exceptions.TimeoutError, "timeout"),
    (TimeoutError, "timeout"),
    (exceptions.ConnectionError, "unreachable"),
    (OSError, "unreachable"),
    (exceptions.RedisError, "error"),
)


class RedisConnection:
    """One server, or what stands for it: a sentinel's or a provider's endpoint.

    Args:
        url: redis://, rediss:// (TLS) or unix://, as redis-py reads it.
        timeout_s: no call takes longer, connecting included.

    Raises:
        ConfigError: the URL can't be used.
    """

    def __init__(self, url: str, timeout_s: float, source: str) -> None:
        self.name = masked(url)
        self._timeout_s = timeout_s
        self._source = source
        self._client = _client(url, timeout_s)
        self._script = self._client.register_script(source)
        # whether the server that answers now was looked at; after a failure it may be another
        self._is_checked = False

    async def check(self) -> None:
        """Looks at the server as it is now.

        Raises:
            ConfigError: quota can't be kept there as it is set up.
            AuthUnavailable: it does not answer.
        """
        with self._failures():
            async with asyncio.timeout(self._timeout_s):
                info = cast("Mapping[str, Any]", await self._client.info("default"))
        refuse_server(self.name, info)
        self._is_checked = True

    async def run(self, key: str, argument: str) -> list[bytes]:
        """The script's reply.

        Raises:
            AuthUnavailable: the server does not answer, refuses, or is none that keeps quota.
        """
        await self._be_checked()
        with self._failures():
            async with asyncio.timeout(self._timeout_s):
                reply: list[bytes] = await self._script(keys=[key], args=[argument])
        return reply

    async def fields(self, key: str) -> dict[str, str]:
        """A hash. Raises AuthUnavailable."""
        await self._be_checked()
        with self._failures():
            async with asyncio.timeout(self._timeout_s):
                found = await cast("Any", self._client.hgetall(key))
        return {name.decode(): value.decode() for name, value in found.items()}

    async def set_field(self, key: str, name: str, value: str, keep_s: int) -> None:
        """One field of a hash, which is kept for so long from now. Raises AuthUnavailable."""
        with self._failures():
            async with (
                asyncio.timeout(self._timeout_s),
                self._client.pipeline(transaction=False) as both,
            ):
                both.hset(key, name, value)
                both.expire(key, keep_s)
                await both.execute()

    async def drop_field(self, key: str, name: str) -> None:
        """Raises AuthUnavailable."""
        with self._failures():
            async with asyncio.timeout(self._timeout_s):
                await cast("Any", self._client.hdel(key, name))

    async def close(self) -> None:
        """Closes every connection."""
        with contextlib.suppress(exceptions.RedisError, OSError, TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                await self._client.aclose()

    async def _be_checked(self) -> None:
        if self._is_checked:
            return
        try:
            await self.check()
        except ConfigError as error:
            metrics.LEASE_STORE_FAILURES.labels("unfit").inc()
            metrics.LEASE_STORE_UP.labels("redis").set(0)
            _log.error("redis is not fit for quota", extra={"redis": self.name, "why": str(error)})
            raise AuthUnavailable(str(error), retry_after_s=_RETRY_AFTER_S) from None

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except tuple(kind for kind, _ in _REASONS) as error:
            # a handshake's error comes as one of connecting
            cause = error.__cause__ if isinstance(error.__cause__, exceptions.RedisError) else error
            reason = next(reason for kind, reason in _REASONS if isinstance(cause, kind))
            self._is_checked = False
            metrics.LEASE_STORE_FAILURES.labels(reason).inc()
            metrics.LEASE_STORE_UP.labels("redis").set(0)
            _log.error("redis failed", extra={"redis": self.name, "error": reason})
            # the server's own words are left out: they may repeat what it was sent
            raise AuthUnavailable(
                f"the quota in {self.name} can't be used: {reason.replace('_', ' ')}",
                retry_after_s=_RETRY_AFTER_S,
            ) from None
        metrics.LEASE_STORE_UP.labels("redis").set(1)


def refuse_server(name: str, info: Mapping[str, Any]) -> None:
    """Raises ConfigError for a server that can't keep quota, by what INFO says."""
    version = str(info.get("redis_version", "0"))
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if found < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise ConfigError(f"auth.redis_url: {name} is Redis {version}; {oldest} is the oldest")
    if info.get("cluster_enabled"):
        raise ConfigError(
            f"auth.redis_url: {name} is a node of a cluster; use one primary, or an endpoint "
            "that stands for the whole cluster"
        )
    policy = info.get("maxmemory_policy", "noeviction")
    if info.get("maxmemory") and policy != "noeviction":
        raise ConfigError(
            f"auth.redis_url: {name} may evict what is spent (maxmemory-policy {policy}), and "
            "tenants would get it again; set noeviction"
        )


def server_of(url: str) -> tuple[str, bool]:
    """Where a URL leads, as the mesh writes addresses; whether what is said there is encrypted.

    Raises:
        ConfigError: it is no such URL.
    """
    try:
        parts = urlsplit(url)
        address = f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
    except ValueError:
        parts, address = urlsplit(""), ""
    if parts.scheme not in _SCHEMES:
        # the value may hold a password
        raise ConfigError(
            "auth.redis_url is no URL of Redis; redis://HOST:PORT/0, rediss://… (TLS) and "
            "unix:///path?db=0 are"
        )
    if parts.scheme == "unix":
        return f"unix:{parts.path}", False
    return address, parts.scheme == "rediss"


def _client(url: str, timeout_s: float) -> aioredis.Redis:
    server_of(url)
    try:
        pool = aioredis.BlockingConnectionPool.from_url(
            url,
            max_connections=_POOL_SIZE,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            # the gateway asks again; asked twice here, a call would have two deadlines
            retry=Retry(NoBackoff(), 0),
        )
    except (ValueError, TypeError):
        raise ConfigError(f"auth.redis_url is {masked(url)}, which redis-py can't read") from None
    return aioredis.Redis.from_pool(pool)
