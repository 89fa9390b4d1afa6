"""The gate of a gateway with an auth service: verified keys, leased quota, spooled usage."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc

from gateway.auth.fail_open import FailPolicy
from gateway.auth.headers import limit_headers
from gateway.auth.instances import AuthInstances
from gateway.auth.lease_stream import BROKEN
from gateway.auth.leasing import LeaseKeeper
from gateway.auth.metrics import ADMISSIONS
from gateway.auth.open_account import OpenAccount
from gateway.auth.principals import PrincipalCache
from gateway.auth.tenant_quota import Hold
from gateway.auth.usage import Spool
from gateway.auth.usage_sender import UsageSender
from gateway.auth.verifier import Verifier
from gateway.identity import Principal
from gateway.records import RequestRecord
from infermesh.config import ConfigError, GatewayConfig
from infermesh.errors import MeshError
from infermesh.security.certificates import Certificates


class KeyedGate:
    """Asks the auth service; create it inside the event loop.

    Args:
        clock: monotonic seconds.

    Raises:
        ConfigError: there is no folder for usage.
    """

    def __init__(
        self,
        config: GatewayConfig,
        clock: Callable[[], float],
        certificates: Certificates | None = None,
        refuse: Callable[[Sequence[str]], None] = lambda addresses: None,
    ) -> None:
        if not config.usage_dir:
            raise ConfigError("gateway.usage_dir is empty; with gateway.auth it must be a folder")
        self._spool = Spool(Path(config.usage_dir).expanduser())
        self._instances = AuthInstances(
            config.auth, config.discovery_interval_s, certificates, refuse
        )
        cache = PrincipalCache(config.principal_ttl_s, config.auth_outage_s, clock)
        picker = self._instances.picker
        policy = FailPolicy(
            config.auth_fail_policy == "open",
            config.auth_fail_open_max_s,
            config.auth_fail_open_share,
        )
        self._leases = LeaseKeeper(picker(), config.gateway_id, clock, policy)
        self._verifier = Verifier(picker(), cache, self._leases.forget_refusal)
        self._sender = UsageSender(picker(), self._spool)

    async def identify(self, credential: str | None, scope: str) -> Principal:
        principal = await self._verifier.identify(credential)
        principal.require(scope)
        return principal

    async def tokens_left(self, principal: Principal) -> int | None:
        return await self._leases.tokens_left(principal)

    async def admit(
        self, principal: Principal, num_tokens: int, record_id: str | None = None
    ) -> "KeyedTicket":
        try:
            hold = await self._leases.reserve(principal, num_tokens)
        except MeshError as error:
            # told to clients as headers, and on gRPC as details
            ADMISSIONS.labels(error.code).inc()
            error.metadata.update(self._headers(principal), tenant=principal.tenant)
            raise
        headers = {}
        if hold is not None:
            is_open = isinstance(hold.account, OpenAccount)
            ADMISSIONS.labels("open" if is_open else "admitted").inc()
            headers = self._headers(principal)
        return KeyedTicket(principal, hold, headers, self._leases, self._spool, record_id)

    def start(self, tasks: asyncio.TaskGroup) -> None:
        tasks.create_task(self._instances.run())
        tasks.create_task(self._verifier.follow())
        tasks.create_task(self._leases.run())
        tasks.create_task(self._sender.run())

    async def flush(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError, OSError):
            async with asyncio.timeout(timeout_s):
                await self._sender.flush()
        with contextlib.suppress(*BROKEN):
            async with asyncio.timeout(timeout_s):
                await self._leases.close()

    async def close(self) -> None:
        self._spool.close()
        await self._instances.close()

    def _headers(self, principal: Principal) -> dict[str, str]:
        return limit_headers(principal.limits, self._leases.last_grant(principal.tenant))


class KeyedTicket:
    """A request's hold on quota, and its row in the ledger."""

    def __init__(
        self,
        principal: Principal,
        hold: Hold | None,
        headers: dict[str, str],
        leases: LeaseKeeper,
        spool: Spool,
        record_id: str | None,
    ) -> None:
        self.headers = headers
        self._principal = principal
        self._hold = hold
        self._leases = leases
        self._spool = spool
        self._record_id = record_id
        self._closed = False

    def settle(self, record: RequestRecord) -> None:
        if self._closed:
            return
        usage = record.usage
        # a part is no reason to leave out the whole, which the client may still ask for
        is_whole = record.status in ("running", "ok")
        self._release(usage.prompt_tokens + usage.completion_tokens)
        self._spool.append(
            {
                "record_id": (self._record_id if is_whole else None) or secrets.token_hex(16),
                "request_id": record.request_id,
                "tenant_id": self._principal.tenant,
                "key_id": self._principal.key_id,
                "model": record.model,
                "endpoint": record.endpoint,
                "status": "ok" if record.status == "running" else record.status,
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "cached_prompt_tokens": usage.cached_prompt_tokens,
                "finished_unix_ms": time.time_ns() // 1_000_000,
            }
        )

    def cancel(self) -> None:
        if not self._closed:
            self._release(0)

    def _release(self, used_tokens: int) -> None:
        self._closed = True
        if self._hold is not None:
            self._leases.settle(self._hold, used_tokens)
