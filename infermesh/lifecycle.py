"""One life for everything that runs, and the main function of every service process.

    New ──► Starting ──► Running ──► Draining ──► Stopped
               │            │           │
               └────────────┴───────────┴───────► Failed

SIGTERM or SIGINT: drain within the grace period, stop, exit 0. A second one cuts the drain short.
"""

import asyncio
import ctypes
import enum
import gc
import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

import infermesh
from infermesh.config import ConfigError, TelemetryConfig
from infermesh.errors import MeshError
from infermesh.telemetry import endpoint, logs, metrics, otlp_metrics, tracing, vitals

_log = logs.get(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_BUILD = metrics.gauge(
    "build_info", "1; what runs here is in the labels.", ("service", "version", "python")
)


class State(enum.Enum):
    """Where a service is in its life."""

    NEW = "new"
    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


_ALLOWED = {
    State.NEW: {State.STARTING},
    State.STARTING: {State.RUNNING, State.STOPPED, State.FAILED},
    State.RUNNING: {State.DRAINING, State.FAILED},
    State.DRAINING: {State.STOPPED, State.FAILED},
    State.STOPPED: set(),
    State.FAILED: set(),
}


class Service(Protocol):
    """What a process runs."""

    name: str

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Returns when it can serve; background work goes into `tasks`."""

    async def drain(self, grace_s: float) -> None:
        """Refuses new work and finishes, or hands over, what it has."""

    async def stop(self) -> None:
        """Closes sockets; called once, also when start failed half-way."""

    def announce(self) -> dict[str, str]:
        """At least `address`; what a supervisor wants to know once it serves."""


class _Stopped(Exception):
    """Leaves the task group of a service that has stopped, cancelling its background tasks."""


class Lifecycle:
    """Takes one service through its states."""

    def __init__(self, service: Service, grace_s: float) -> None:
        self._service = service
        self._grace_s = grace_s
        self._signals = 0
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self.state = State.NEW

    def request_stop(self) -> None:
        """First call: drain and stop. Second call: stop now."""
        self._signals += 1
        self._stopping.set()
        if self._signals > 1:
            self._hurry.set()

    async def run(self, on_running: Callable[[], None]) -> None:
        """Runs the service until it was asked to stop.

        Raises:
            Exception: whatever start or a background task raised; the state is then FAILED.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(vitals.keep_beating())
                await self._live(tasks, on_running)
                raise _Stopped
        except* _Stopped:
            self._to(State.STOPPED)
        except* BaseException:
            self._to(State.FAILED)
            await self._service.stop()
            raise

    async def _live(self, tasks: asyncio.TaskGroup, on_running: Callable[[], None]) -> None:
        self._to(State.STARTING)
        started = await first(self._service.start(tasks), self._stopping.wait(), tasks)
        if started:
            self._to(State.RUNNING)
            on_running()
            await self._stopping.wait()
            self._to(State.DRAINING)
            await first(self._service.drain(self._grace_s), self._hurry.wait(), tasks)
        await self._service.stop()

    def _to(self, state: State) -> None:
        if state not in _ALLOWED[self.state]:
            raise AssertionError(f"{self.state} may not become {state}")
        self.state = state
        _log.info("lifecycle", extra={"state": state.value})


async def first(
    main: Coroutine[Any, Any, Any], other: Coroutine[Any, Any, Any], tasks: asyncio.TaskGroup
) -> bool:
    """Runs both until one ends and cancels the other; True where `main` ended.

    Raises whatever `main` raised.
    """
    a, b = tasks.create_task(main), tasks.create_task(other)
    try:
        await asyncio.wait((a, b), return_when=asyncio.FIRST_COMPLETED)
    finally:
        done = a.done()
        for task in (a, b):
            task.cancel()
    if done:
        a.result()
    return done


def run(factory: Callable[[], Service], telemetry: TelemetryConfig, grace_s: float) -> int:
    """The main function of a service process; returns its exit status.

    The factory is called inside the event loop, so that it may create channels.
    """
    _die_with(telemetry.supervisor_pid)
    status = 1
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            status = runner.run(_run(factory, telemetry, grace_s))
    except* (MeshError, ConfigError, OSError) as group:
        sys.stderr.write(f"error: {_leaf(group)}\n")
    finally:
        tracing.shutdown()
        # Channels in cycles would live on, and where it used TLS gRPC waits 2 s for their end.
        gc.collect()
    return status


async def _run(factory: Callable[[], Service], telemetry: TelemetryConfig, grace_s: float) -> int:
    service = factory()
    name = telemetry.service_name or service.name
    logs.setup(name, telemetry.log_level, telemetry.log_format)
    _BUILD.labels(service.name, infermesh.__version__, platform.python_version()).set(1)
    tracing.setup(name, telemetry.otlp_endpoint, telemetry.trace_file)
    metrics_address = endpoint.serve(telemetry.metrics_address)
    exporter = otlp_metrics.start(
        name, infermesh.__version__, telemetry.otlp_endpoint, telemetry.otlp_metrics_interval_s
    )
    lifecycle = Lifecycle(service, grace_s)
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, lifecycle.request_stop)

    def announce() -> None:
        if telemetry.announce_file:
            facts = {"name": name, "pid": os.getpid(), **service.announce()}
            facts["metrics"] = metrics_address
            write_whole(Path(telemetry.announce_file), json.dumps(facts))

    try:
        await lifecycle.run(announce)
    finally:
        if exporter is not None:
            await asyncio.to_thread(exporter.stop)
        for number in _SIGNALS:  # they hold the service, and so its channels
            loop.remove_signal_handler(number)
    return 0


def write_whole(path: Path, text: str, mode: int = 0o644) -> None:
    """Writes a file so that a reader sees all of it or nothing, and nobody else ever could."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "w") as file:
        file.write(text)
    draft.replace(path)


def _leaf(group: BaseExceptionGroup[Any]) -> BaseException:
    inner = group.exceptions[0]
    return _leaf(inner) if isinstance(inner, BaseExceptionGroup) else inner


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # a bare compute host
        return None
    return uvloop.new_event_loop


def _die_with(supervisor_pid: int) -> None:
    """Linux: SIGTERM when the supervisor dies, however it dies."""
    if not supervisor_pid:
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != supervisor_pid:  # it died before the call
        os.kill(os.getpid(), signal.SIGTERM)
