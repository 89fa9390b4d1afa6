"""The real gateway, in this event loop, in front of fake schedulers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

from gateway.server import GatewayService
from infermesh.config import GatewayConfig
from infermesh.lifecycle import Lifecycle
from tests.fake_cache import FakeCache
from tests.fake_scheduler import FakeScheduler


@dataclass
class Edge:
    """A running gateway with its replicas and clients."""

    service: GatewayService
    lifecycle: Lifecycle
    replicas: list[FakeScheduler]
    http: httpx.AsyncClient
    openai: openai.AsyncOpenAI
    cache: FakeCache | None = None
    closers: list[Any] = field(default_factory=list)

    @property
    def replica(self) -> FakeScheduler:
        return self.replicas[0]

    @property
    def grpc_address(self) -> str:
        return self.service.announce()["grpc_address"]

    @property
    def admin_url(self) -> str:
        return f"http://{self.service.announce()['admin_address']}"

    async def routable(self, count: int) -> None:
        """Until exactly that many replicas take requests."""
        async with asyncio.timeout(10):
            while sum(c.routable for c in self.service.fleet.clients) != count:
                await self.service.fleet.changed(1.0)

    async def cache_usable(self, usable: bool) -> None:
        """Until the gateway sees its cache, or sees it gone."""
        client = self.service.cache
        async with asyncio.timeout(10):
            while client is not None and client.usable != usable:
                await client.changed()


@asynccontextmanager
async def running_gateway(
    tmp_path: Path,
    replicas: list[FakeScheduler],
    *,
    wait: bool = True,
    cache: FakeCache | None = None,
    cache_starts: bool = True,
    **settings: Any,
) -> AsyncIterator[Edge]:
    """A gateway with free ports; its replicas and its cache are started and stopped with it."""
    for replica in replicas:
        await replica.start()
    if cache is not None and cache_starts:
        await cache.start()
    config = GatewayConfig(
        http_address="127.0.0.1:0",
        admin_address="127.0.0.1:0",
        grpc_address=f"unix:{tmp_path}/gateway.sock",
        replicas=tuple(replica.address for replica in replicas),
        cache=cache.address if cache is not None else "",
        **settings,
    )
    service = GatewayService(config)
    lifecycle = Lifecycle(service, grace_s=5.0)
    running = asyncio.Event()
    life = asyncio.create_task(lifecycle.run(running.set))
    await asyncio.wait(
        [life, asyncio.ensure_future(running.wait())], return_when=asyncio.FIRST_COMPLETED
    )
    if life.done():
        life.result()
    url = f"http://{service.announce()['http_address']}"
    # nothing here is TLS, and to load the authorities takes a tenth of a second each time
    http = httpx.AsyncClient(base_url=url, timeout=20, verify=False)
    client = openai.AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key="any",
        max_retries=0,
        timeout=20,
        http_client=openai.DefaultAsyncHttpxClient(timeout=20, verify=False),
    )
    edge = Edge(service, lifecycle, replicas, http, client, cache)
    try:
        if wait:
            await edge.routable(len(replicas))
            await edge.cache_usable(cache is not None)
        yield edge
    finally:
        await http.aclose()
        await client.close()
        lifecycle.request_stop()
        lifecycle.request_stop()
        await life
        for replica in replicas:
            await replica.kill()
        if cache is not None:
            await cache.kill()


def make_replicas(tmp_path: Path, count: int = 1) -> list[FakeScheduler]:
    """Fake schedulers on unix sockets."""
    return [FakeScheduler(f"unix:{tmp_path}/replica-{index}.sock") for index in range(count)]
