"""The auth service as a process: database, stores and gRPC servers, in the kit's lifecycle."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from infermesh import rpc
from infermesh.config import AuthConfig, ConfigError
from infermesh.errors import AuthUnavailable
from infermesh.security.posture import LOCAL, Security
from infermesh.v1 import (
    auth_admin_service_pb2,
    auth_admin_service_pb2_grpc,
    auth_service_pb2,
    auth_service_pb2_grpc,
)
from services.auth import first_key
from services.auth.admin_server import AuthAdminServicer
from services.auth.changes import ChangeFeed
from services.auth.database import Database
from services.auth.keys import Keys
from services.auth.lease_store import LeaseStore
from services.auth.leases import Leases
from services.auth.ledger import Ledger
from services.auth.ledger_sums import LedgerSums
from services.auth.limits import KnownLimits
from services.auth.migrate import migrate
from services.auth.redis_connection import RedisConnection, server_of
from services.auth.redis_leases import RedisLeases
from services.auth.redis_script import SOURCE
from services.auth.server import AuthServicer
from services.auth.tenants import Tenants
from services.auth.tokens import Tokens

_NAME = auth_service_pb2.DESCRIPTOR.services_by_name["AuthService"].full_name
_ADMIN_NAME = auth_admin_service_pb2.DESCRIPTOR.services_by_name["AuthAdminService"].full_name

_STOP_GRACE_S = 0.5


class AuthProcess:
    """Implements `infermesh.lifecycle.Service`.

    Args:
        clock: seconds of the Unix epoch; None: this machine's, and for quota in Redis the
            server's.

    Raises:
        ConfigError: a setting can't be used.
    """

    name = "auth"

    def __init__(
        self,
        config: AuthConfig,
        clock: Callable[[], float] | None = None,
        security: Security = LOCAL,
    ) -> None:
        security.check_service("auth.address", config.address)
        is_socket = not config.admin_address or config.admin_address.startswith("unix:")
        if security.certificates is None and not is_socket:
            raise ConfigError(
                f"auth.admin_address is {config.admin_address}; it must be unix:/path, whose file "
                "permissions say who may create keys, unless security.tls_folder is set"
            )
        if config.redis_url:
            security.check_store("auth.redis_url", *server_of(config.redis_url))
        self._config = config
        self._security = security
        self._clock = clock or time.time
        self._store_clock = clock
        self._tokens = Tokens(config, self._clock) if config.jwt_keys_file else None
        self._database = Database(config.database_url)
        self._redis: RedisConnection | None = None
        self._servers: list[grpc.aio.Server] = []
        self._health: list[rpc.HealthHandle] = []
        self._addresses: dict[str, str] = {}
        self._feeding: asyncio.Task[None] | None = None

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Migrates the database, then serves.

        Raises:
            ConfigError: the database can't be used, or is a later version's; or Redis can't keep
                quota as it is set up.
        """
        config, clock = self._config, self._clock
        await migrate(self._database)
        if config.first_key_file:
            await first_key.ensure(self._database, Path(config.first_key_file), clock)
        feed = ChangeFeed(self._database, clock)
        await feed.start()
        keys = Keys(self._database, clock, feed.notify, self._tokens)
        limits = KnownLimits(self._database, feed)

        def changed() -> None:
            limits.forget()
            feed.notify()

        tenants = Tenants(self._database, clock, changed)
        leases = await self._leases(limits)
        ledger = Ledger(self._database)
        guarded = self._security.certificates is not None
        server = rpc.create_server(guarded=guarded)
        servicer = AuthServicer(keys, leases, ledger, feed)
        auth_service_pb2_grpc.add_AuthServiceServicer_to_server(servicer, server)
        await self._serve("address", server, config.address, _NAME)
        if config.admin_address:
            server = rpc.create_server(guarded=guarded)
            admin = AuthAdminServicer(tenants, keys, ledger)
            auth_admin_service_pb2_grpc.add_AuthAdminServiceServicer_to_server(admin, server)
            await self._serve("admin_address", server, config.admin_address, _ADMIN_NAME)
        self._feeding = tasks.create_task(feed.run())
        listens = {f"auth.{setting}": address for setting, address in self._addresses.items()}
        self._security.report(listens)

    async def drain(self, grace_s: float) -> None:
        """Calls under way finish; streams of gateways never end by themselves."""
        del grace_s
        for health in self._health:
            await health.set_serving(False)

    async def stop(self) -> None:
        """Closes sockets and the database."""
        for server in self._servers:
            await server.stop(grace=_STOP_GRACE_S)
        if self._feeding is not None:
            # nobody may open a connection any more
            self._feeding.cancel()
            await asyncio.wait([self._feeding])
        if self._redis is not None:
            await self._redis.close()
        await self._database.close()

    def announce(self) -> dict[str, str]:
        """Where it serves."""
        return self._addresses

    async def _leases(self, limits: KnownLimits) -> LeaseStore:
        config = self._config
        if not config.redis_url:
            return Leases(self._database, config.lease_s, config.max_request_s, self._clock)
        timeout_s = config.redis_timeout_ms / 1000
        self._redis = RedisConnection(config.redis_url, timeout_s, SOURCE)
        with contextlib.suppress(AuthUnavailable):  # keys are verified without it
            await self._redis.check()
        sums = LedgerSums(self._database)
        times = (config.lease_s, config.max_request_s)
        return RedisLeases(self._redis, limits, sums, *times, self._store_clock)

    async def _serve(self, setting: str, server: grpc.aio.Server, address: str, name: str) -> None:
        self._servers.append(server)
        health = rpc.add_standard_services(server, [name])
        self._health.append(health)
        self._addresses[setting] = rpc.bind(server, address, self._security.certificates)
        await server.start()
        await health.set_serving(True)
