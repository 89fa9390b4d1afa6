"""The scheduler as a process: its gRPC server and its background tasks, in the kit's lifecycle."""

from __future__ import annotations

import asyncio

from infermesh import rpc
from infermesh.config import SchedulerConfig
from infermesh.security.posture import LOCAL, Security
from infermesh.v1 import scheduler_service_pb2, scheduler_service_pb2_grpc
from services.scheduler.replica import Replica, State
from services.scheduler.server import SchedulerServicer
from services.scheduler.shard_link import ShardLink
from services.scheduler.shard_loop import ShardLoop

_NAME = scheduler_service_pb2.DESCRIPTOR.services_by_name["SchedulerService"].full_name


class SchedulerProcess:
    """Implements `infermesh.lifecycle.Service`."""

    name = "scheduler"

    def __init__(self, config: SchedulerConfig, security: Security = LOCAL) -> None:
        security.check_service("scheduler.address", config.address)
        security.check_peers("scheduler.shard", [config.shard])
        self._config = config
        self._security = security
        certificates = security.certificates
        self._replica = Replica(config)
        self._link = ShardLink(config.shard, config, certificates)
        self._server = rpc.create_server(guarded=certificates is not None)
        self._address = ""

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Serves at once, so that gateways can watch the model load."""
        servicer = SchedulerServicer(self._replica, tasks)
        scheduler_service_pb2_grpc.add_SchedulerServiceServicer_to_server(servicer, self._server)
        health = rpc.add_standard_services(self._server, [_NAME])
        await health.set_serving(False)
        self._address = rpc.bind(self._server, self._config.address, self._security.certificates)
        await self._server.start()
        self._security.report({"scheduler.address": self._address})
        tasks.create_task(ShardLoop(self._replica, self._link).run())
        tasks.create_task(self._replica.watch_deadlines())
        tasks.create_task(self._replica.watch_recovery())
        tasks.create_task(self._replica.watch_orphans())
        tasks.create_task(self._report_health(health))

    async def drain(self, grace_s: float) -> None:
        """Refuses new requests, finishes the open ones within the grace period."""
        await self._replica.drain(grace_s)

    async def stop(self) -> None:
        """Closes sessions and the link to the shard."""
        await self._server.stop(grace=1.0)
        await self._link.close()

    def announce(self) -> dict[str, str]:
        """Where it serves."""
        return {"address": self._address}

    async def _report_health(self, health: rpc.HealthHandle) -> None:
        """Recovering counts as serving: requests are accepted and go on after it."""
        was_serving = False
        while True:
            changed = self._replica.changed.next()
            serving = self._replica.state in (State.SERVING, State.RECOVERING)
            if serving is not was_serving:
                await health.set_serving(serving)
                was_serving = serving
            await changed.wait()
