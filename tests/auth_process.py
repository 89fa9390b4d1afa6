"""The real auth service in this event loop, with both of its clients and a clock to turn."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infermesh import rpc
from infermesh.config import AuthConfig
from infermesh.lifecycle import Lifecycle
from infermesh.v1 import auth_admin_service_pb2 as admin_pb
from infermesh.v1 import auth_service_pb2 as pb
from infermesh.v1.auth_admin_service_pb2_grpc import AuthAdminServiceStub
from infermesh.v1.auth_service_pb2_grpc import AuthServiceStub
from services.auth.service import AuthProcess


@dataclass
class Auth:
    """A running auth service."""

    config: AuthConfig
    stub: Any
    admin: Any
    _life: "asyncio.Task[None]"
    _lifecycle: Lifecycle

    async def tenant(
        self, id: str, *, policy: pb.TenantPolicy | None = None, **limits: int
    ) -> None:
        """Creates a tenant with these limits."""
        request = admin_pb.CreateTenantRequest(
            id=id, limits=pb.TenantLimits(**limits), policy=policy
        )
        await self.admin.CreateTenant(request)

    async def key(self, tenant_id: str, **options: Any) -> tuple[str, str]:
        """Creates a key; its text and its id."""
        answer = await self.admin.CreateKey(
            admin_pb.CreateKeyRequest(tenant_id=tenant_id, **options)
        )
        return answer.api_key, answer.key.id

    async def usage(self, tenant_id: str = "") -> list[Any]:
        """The ledger's totals."""
        answer = await self.admin.QueryUsage(admin_pb.QueryUsageRequest(tenant_id=tenant_id))
        return list(answer.totals)

    async def stop(self) -> None:
        """Closes its sockets at once."""
        self._lifecycle.request_stop()
        self._lifecycle.request_stop()
        await self._life


class TurnedClock:
    """Seconds of the Unix epoch, which only go on when they are told to."""

    def __init__(self) -> None:
        self.now = float(int(time.time()))

    def __call__(self) -> float:
        return self.now


async def start_auth(folder: Path, database_url: str, **settings: Any) -> Auth:
    """Starts one; `clock` among the settings replaces the wall's."""
    clock = settings.pop("clock", None)
    config = AuthConfig(
        address=f"unix:{folder}/auth.sock",
        admin_address=f"unix:{folder}/admin.sock",
        database_url=database_url,
        **settings,
    )
    lifecycle = Lifecycle(AuthProcess(config, clock), grace_s=1.0)
    running = asyncio.Event()
    life = asyncio.create_task(lifecycle.run(running.set))
    waiting = asyncio.create_task(running.wait())
    await asyncio.wait([life, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if life.done():
        life.result()
    channels = rpc.channel(config.address), rpc.channel(config.admin_address)
    return Auth(
        config, AuthServiceStub(channels[0]), AuthAdminServiceStub(channels[1]), life, lifecycle
    )


@asynccontextmanager
async def running_auth(folder: Path, database_url: str, **settings: Any) -> AsyncIterator[Auth]:
    """One that is stopped with the block."""
    auth = await start_auth(folder, database_url, **settings)
    try:
        yield auth
    finally:
        with contextlib.suppress(ExceptionGroup):
            await auth.stop()
