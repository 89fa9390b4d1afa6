"""Starts, watches, replaces and stops the processes of a mesh.

Start: in the plan's order but without waiting, because each process waits for its peers; late
groups once the mesh can answer. Stop: group by group in reverse, the gateway first, so that streams
in flight finish. Before the mesh first answered, a process that ends is fatal; after, it is
restarted. The gateway's HTTP sockets are held here, so that connections wait for its successor.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infermesh import sockets
from infermesh.errors import Internal, MeshError
from infermesh.lifecycle import write_whole
from infermesh.mesh import dev_key
from infermesh.mesh.plan import MeshPlan
from infermesh.mesh.process import ManagedProcess
from infermesh.mesh.readiness import Progress, wait_gateway, wait_replica
from infermesh.mesh.rolling import Report, roll
from infermesh.mesh.state import PRIVATE, StateFolder
from infermesh.mesh.watchdog import watch
from infermesh.security.certificates import Certificates

ANY_KEY = "local"  # without an auth service every key is accepted
STOP_MARGIN_S = 5.0
# A gateway that takes over has its connections waiting until it knows the replicas.
WARM_UP_S = 20.0
_BACKLOG = 2048


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the mesh listens, and the names it serves: its models, then their aliases."""

    url: str
    admin_url: str
    grpc: str
    models: tuple[str, ...]
    api_key: str


class Supervisor:
    """The processes of one plan.

    Args:
        plan: what to run.
        state: where the key of this machine is kept; endpoints and pids go there, too.
        ready_file: where else to write those once the mesh can answer.
        grace_s: time for each process to drain.
        certificates: with which it speaks to them; None: in plaintext.
    """

    def __init__(
        self,
        plan: MeshPlan,
        state: StateFolder,
        ready_file: Path | None,
        grace_s: float,
        certificates: Certificates | None = None,
    ) -> None:
        self._certificates = certificates
        self._plan = plan
        self._state = state
        self._ready_files = [state.run_file, *([ready_file] if ready_file is not None else [])]
        self._grace_s = grace_s
        self._endpoints: Endpoints | None = None
        self._groups = [
            [ManagedProcess(spec, self._write_ready_file) for spec in group.processes]
            for group in plan.groups
        ]
        self._all = [process for group in self._groups for process in group]
        self._late = [
            process
            for group, processes in zip(plan.groups, self._groups, strict=True)
            if group.late
            for process in processes
        ]
        self._early = [process for process in self._all if process not in self._late]
        self._gateway = next(p for p in self._all if p.spec == plan.gateway)
        self._listeners: list[socket.socket] = []
        self._num_rolls = 0
        self._last_roll_error = ""

    @asynccontextmanager
    async def running(self, on_progress: Progress) -> AsyncIterator[Endpoints]:
        """The mesh, answering inside the block; drained and gone after it.

        Raises:
            MeshError: a process or its model could not start; nothing is left running.
        """
        try:
            self._listen()
            for process in self._early:
                await process.start()
            self._endpoints = await self._wait_ready(on_progress)
            self._write_ready_file()
            async with asyncio.TaskGroup() as tasks:
                for process in self._late:
                    await process.start()
                keepers = [tasks.create_task(p.keep_running()) for p in self._all]
                keepers += [tasks.create_task(self._list_once_announced(p)) for p in self._late]
                keepers += [
                    tasks.create_task(watch(p, self._certificates))
                    for p in self._all
                    if p.spec.probed
                ]
                try:
                    yield self._endpoints
                finally:
                    await self._stop()
                    for keeper in keepers:
                        keeper.cancel()
        finally:
            await self._stop()
            for listener in self._listeners:
                listener.close()
            for path in self._ready_files:
                path.unlink(missing_ok=True)

    async def roll(self, report: Report) -> None:
        """Replaces every process by a new one; see `rolling`.

        Raises:
            Internal: a new gateway did not come up; the old one goes on.
        """
        try:
            await self._roll(report)
            self._last_roll_error = ""
        except MeshError as error:
            self._last_roll_error = error.message
            raise
        finally:
            self._num_rolls += 1
            self._write_ready_file()

    async def _roll(self, report: Report) -> None:
        assert self._endpoints is not None
        grace_s = self._grace_s + STOP_MARGIN_S
        processes = {process.spec.name: process for process in self._all}
        addresses = self._plan.scheduler_addresses
        admin_url, certificates = self._endpoints.admin_url, self._certificates
        await roll(processes, addresses, admin_url, grace_s, report, certificates)
        if self._plan.auth is not None:  # both live for a while, and each has its own leases
            name = f"{self._plan.gateway_config.gateway_id}.{self._num_rolls + 1}"
            self._gateway.pin("gateway.gateway_id", name)
        await self._gateway.replace(grace_s)
        report("gateway")

    def kill(self) -> None:
        """Ends every process at once, streams or not."""
        for process in self._all:
            process.kill()

    def _listen(self) -> None:
        for setting in ("http_address", "admin_address"):
            name = f"gateway.{setting}"
            listener, _ = sockets.bind(name, getattr(self._plan.gateway_config, setting))
            self._listeners.append(listener)
            listener.listen(_BACKLOG)
            self._gateway.pin(name, f"fd://{listener.fileno()}")
        self._gateway.pin("gateway.grpc_reuse_port", "true")
        self._gateway.inherited = tuple(one.fileno() for one in self._listeners)

    async def _wait_ready(self, on_progress: Progress) -> Endpoints:
        """Raises the first failure of any process, before its peers' complaints about it."""
        async with asyncio.TaskGroup() as tasks:
            deaths = [tasks.create_task(self._raise_on_exit(p)) for p in self._early]
            ready = tasks.create_task(self._ready(on_progress))
            await ready
            for death in deaths:
                death.cancel()
        return ready.result()

    async def _raise_on_exit(self, process: ManagedProcess) -> None:
        await process.wait()
        raise Internal(process.last_words())

    async def _ready(self, on_progress: Progress) -> Endpoints:
        facts = await self._gateway.wait_announced()
        self._gateway.pin("gateway.grpc_address", facts["grpc_address"])
        self._gateway.pin("gateway.warm_up_s", str(WARM_UP_S))
        async with asyncio.TaskGroup() as tasks:
            for process in self._early:
                tasks.create_task(process.wait_announced())
            for address in self._plan.scheduler_addresses:
                tasks.create_task(wait_replica(address, on_progress, self._certificates))
        url = f"http://{facts['http_address']}"
        auth, api_key = self._plan.auth, ANY_KEY
        if auth is not None:
            api_key = await dev_key.obtain(auth, self._state, self._certificates)
        models = await wait_gateway(url, api_key, self._plan.model_names)
        return Endpoints(
            url=url,
            admin_url=f"http://{facts['admin_address']}",
            grpc=facts["grpc_address"],
            models=tuple(models),
            api_key=api_key,
        )

    async def _list_once_announced(self, process: ManagedProcess) -> None:
        with contextlib.suppress(Internal):  # it ended: it is listed after its restart
            await process.wait_announced()
            self._write_ready_file()

    async def _stop(self) -> None:
        for group in reversed(self._groups):
            async with asyncio.TaskGroup() as tasks:
                for process in group:
                    tasks.create_task(process.stop(self._grace_s + STOP_MARGIN_S))

    def _write_ready_file(self) -> None:
        if self._endpoints is None:
            return
        facts: dict[str, Any] = {
            "pid": os.getpid(),
            "rolling_restarts": {"num": self._num_rolls, "error": self._last_roll_error},
            "url": self._endpoints.url,
            "admin_url": self._endpoints.admin_url,
            "grpc": self._endpoints.grpc,
            "api_key": self._endpoints.api_key,
            "auth_admin": self._plan.auth.admin_address if self._plan.auth else None,
            "tls_folder": str(self._certificates.folder) if self._certificates else "",
            "models": list(self._endpoints.models),
            "services": [process.facts for process in self._all if process.facts],
        }
        with contextlib.suppress(OSError):  # a full disk must not end a mesh that serves
            self._state.run_file.parent.mkdir(parents=True, exist_ok=True)
            for path in self._ready_files:
                write_whole(path, json.dumps(facts, indent=2), PRIVATE)
