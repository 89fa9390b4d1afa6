"""Every service goes through one life, whatever happens in it."""

import asyncio

import pytest

from infermesh.errors import ModelLoadFailed
from infermesh.lifecycle import Lifecycle, State


class FakeService:
    name = "fake"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.drain_gate = asyncio.Event()
        self.drain_gate.set()
        self.failure: Exception | None = None

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        self.calls.append("start")
        tasks.create_task(self.background())
        await self.gate.wait()
        if self.failure:
            raise self.failure

    async def background(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.calls.append("background cancelled")
            raise

    async def drain(self, grace_s: float) -> None:
        self.calls.append("drain")
        await self.drain_gate.wait()
        self.calls.append("drained")

    async def stop(self) -> None:
        self.calls.append("stop")

    def announce(self) -> dict[str, str]:
        return {"address": "nowhere"}


async def test_lifecycle_drains_then_stops_then_cancels_background_when_asked() -> None:
    service = FakeService()
    lifecycle = Lifecycle(service, 1.0)
    await lifecycle.run(lifecycle.request_stop)
    assert service.calls == ["start", "drain", "drained", "stop", "background cancelled"]
    assert lifecycle.state is State.STOPPED


async def test_lifecycle_cuts_the_drain_short_when_asked_twice() -> None:
    service = FakeService()
    service.drain_gate.clear()
    lifecycle = Lifecycle(service, 1.0)

    def running() -> None:
        lifecycle.request_stop()
        lifecycle.request_stop()

    await lifecycle.run(running)
    assert service.calls == ["start", "drain", "stop", "background cancelled"]


async def test_lifecycle_stops_without_running_when_asked_while_starting() -> None:
    service = FakeService()
    service.gate.clear()
    lifecycle = Lifecycle(service, 1.0)
    lifecycle.request_stop()
    await lifecycle.run(lambda: pytest.fail("it never ran"))
    assert service.calls[-2:] == ["stop", "background cancelled"]
    assert lifecycle.state is State.STOPPED


async def test_lifecycle_fails_and_stops_when_start_raises() -> None:
    service = FakeService()
    service.failure = ModelLoadFailed("torn file")
    lifecycle = Lifecycle(service, 1.0)
    with pytest.raises(ExceptionGroup):
        await lifecycle.run(lambda: None)
    assert service.calls[-1] == "stop"
    assert lifecycle.state is State.FAILED
