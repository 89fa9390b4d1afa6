"""The shard as a service: its parts put together, started, drained and stopped."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import grpc

from infermesh import rpc
from infermesh.config import ShardConfig
from infermesh.security.posture import LOCAL, Security
from infermesh.v1 import shard_service_pb2_grpc as pb_grpc
from services.shard.domain import LoadSpec
from services.shard.pulse import Pulse
from services.shard.residency import Report, Residency
from services.shard.server import SERVICE_NAME, ShardServicer
from services.shard.sessions import StepStreams
from services.shard.worker import Worker

if TYPE_CHECKING:
    from services.shard.engine import LoadedModel

_STOP_S = 2.0


class ShardService:
    """Implements infermesh.lifecycle.Service."""

    name = "shard"

    def __init__(self, config: ShardConfig, security: Security = LOCAL) -> None:
        security.check_service("shard.address", config.address)
        self._config = config
        self._security = security
        self._worker = Worker()
        self._residency = Residency(self._worker, self._load)
        self._streams = StepStreams(self._worker, self._residency)
        self._pulse = Pulse(self._worker, config)
        self._pulse_changed = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._health: rpc.HealthHandle | None = None
        self._background: list[asyncio.Task[None]] = []
        self._is_draining = False
        self.address = config.address

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Serves at once; the model comes with the first Load."""
        self._worker.start()
        certificates = self._security.certificates
        self._server = server = rpc.create_server(guarded=certificates is not None)
        device = "simulated" if self._config.engine == "simulated" else self._config.device
        servicer = ShardServicer(self._residency, self._streams, device, tasks)
        pb_grpc.add_ShardServiceServicer_to_server(servicer, server)
        self._health = rpc.add_standard_services(server, (SERVICE_NAME,))
        self.address = rpc.bind(server, self._config.address, certificates)
        await server.start()
        await self._health.set_serving(True)
        self._security.report({"shard.address": self.address})
        self._background = [
            tasks.create_task(self._pulse.watch(self._pulse_changed.set)),
            tasks.create_task(self._report_health(self._health)),
        ]

    async def drain(self, grace_s: float) -> None:
        """Opens no new stream and lets the scheduler finish on the one it has."""
        self._streams.drain()
        self._is_draining = True
        if self._health is not None:
            await self._health.set_serving(False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._streams.quiet()

    async def stop(self) -> None:
        """Ends streams, closes the socket and the worker."""
        for task in self._background:
            task.cancel()
        self._streams.close()
        if self._server is not None:
            await self._server.stop(grace=_STOP_S)
        await asyncio.to_thread(self._worker.stop, _STOP_S)

    def announce(self) -> dict[str, str]:
        """The bound address."""
        return {"address": self.address}

    async def _report_health(self, health: rpc.HealthHandle) -> None:
        """An orchestrator's liveness probe shall see a worker that hangs."""
        while True:
            await self._pulse_changed.wait()
            self._pulse_changed.clear()
            if not self._is_draining:
                await health.set_serving(not self._pulse.is_wedged)

    def _load(self, spec: LoadSpec, report: Report) -> LoadedModel:
        # numpy, and torch behind it, are imported in the worker: Describe answers before that.
        from services.shard.loading import load_model

        return load_model(spec, self._config, report)
