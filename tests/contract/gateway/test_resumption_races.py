"""Requests with an idempotency key whose clients, gateways and replicas come a moment too early or
too late.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx

from tests.contract.gateway.test_resumption import (
    ASK,
    CHAT,
    KEY,
    ask,
    content,
    flow,
    leave_after,
    other,
    until,
)
from tests.fake_scheduler import FakeScheduler
from tests.gateway_process import Edge

__all__ = ["other"]  # a fixture


class Stalled:
    """Keeps what a replica is told until it goes on."""

    def __init__(self, replica: FakeScheduler) -> None:
        self._replica = replica
        self._kept: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._names = ("_on_attach", "_on_cancel", "_on_submit")
        for name in self._names:
            setattr(replica, name, self._keep(getattr(replica, name)))

    def _keep(self, method: Callable[..., Any]) -> Callable[..., None]:
        return lambda *arguments: self._kept.append((method, arguments))

    @property
    def num_told(self) -> int:
        return len(self._kept)

    def go_on(self) -> None:
        for name in self._names:
            delattr(self._replica, name)
        for method, arguments in self._kept:
            method(*arguments)


async def test_answer_that_a_stop_string_ends_in_mid_stream_is_kept(edge: Edge) -> None:
    edge.replica.gated = True
    asking = asyncio.create_task(ask(edge, stop="word 3"))
    await edge.replica.wait(lambda: len(edge.replica.submits) == 1)
    while not asking.done():
        await edge.replica.step()
        await asyncio.sleep(0.01)  # the reader keeps pace: it ends before the replica does
    flow(edge)
    again = await ask(edge, stop="word 3")
    assert content(again) == content(await asking)
    assert again.headers["infermesh-resumed"] == "true"
    assert len(edge.replica.submits) == 1


async def test_request_goes_on_when_a_replica_finds_it_after_it_was_given_up(
    edge: Edge, other: httpx.AsyncClient
) -> None:
    await leave_after(edge, 7)
    stalled = Stalled(edge.replica)
    missed = await other.post(
        CHAT, json={**ASK, "stream": True}, headers={**KEY, "last-event-id": "3"}
    )
    assert missed.status_code == 404
    stalled.go_on()
    flow(edge)
    found = await other.post(CHAT, json=ASK, headers=KEY)
    assert found.headers["infermesh-resumed"] == "true"
    assert edge.replica.cancelled == []
    assert len(edge.replica.submits) == 1


async def test_request_goes_on_when_its_client_leaves_again_while_it_is_asked_for(
    edge: Edge, other: httpx.AsyncClient
) -> None:
    await leave_after(edge, 7)
    stalled = Stalled(edge.replica)
    asking = asyncio.create_task(other.post(CHAT, json=ASK, headers=KEY))
    await until(lambda: stalled.num_told > 0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await asyncio.sleep(0.1)  # the gateway hears of it in its own time, and tells nobody
    stalled.go_on()
    flow(edge)
    assert edge.replica.cancelled == []
