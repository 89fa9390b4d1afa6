"""The load generator against a server of known faults: every way to fail is counted by its name."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from benchmarks.load import Client, Target, run_load, send
from benchmarks.timeline import Timeline
from benchmarks.workload import Workload

WORKLOAD = Workload(prompt_tokens=4, output_tokens=3)


def event(text: str, **more: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}], **more}).encode() + b"\n\n"


USAGE = {"prompt_tokens": 4, "completion_tokens": 3}
LAST = b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\n"
DONE = b"data: [DONE]\n\n"
GOOD = (200, [event("a"), b": keep-alive\n\n", event("b"), event(""), event("c"), LAST, DONE])
FULL = {"error": {"code": "queue_full", "message": "come again"}}


class Server:
    """Answers every request alike, in chunks; keeps the bodies."""

    def __init__(self, status: int, chunks: list[bytes]) -> None:
        self._status = status
        self._chunks = chunks
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        self.heads.append(head)
        self.bodies.append(json.loads(await reader.readexactly(length)))
        writer.write(f"HTTP/1.1 {self._status} X\r\nconnection: close\r\n\r\n".encode())
        for chunk in self._chunks:
            writer.write(chunk)
            await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def serving(status: int, chunks: list[bytes]) -> AsyncIterator[Server]:
    server = Server(status, chunks)
    async with await asyncio.start_server(server.answer, "127.0.0.1", 0) as listening:
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        yield server


async def ask(status: int, chunks: list[bytes]) -> Timeline:
    async with (
        serving(status, chunks) as server,
        Client(Target(server.url, "m"), WORKLOAD) as client,
    ):
        return await client.ask([1, 2, 3, 4], time.perf_counter())


async def test_chunks_with_text_are_timed_and_tokens_taken_from_usage() -> None:
    answer = await ask(*GOOD)
    assert answer.error is None
    assert len(answer.chunks_s) == 3
    assert (answer.prompt_tokens, answer.output_tokens) == (4, 3)
    times = [answer.due_s, *answer.chunks_s, answer.ended_s]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("status", "chunks", "error"),
    [
        (429, [json.dumps(FULL).encode()], "queue_full"),
        (400, [json.dumps({"error": {"type": "invalid", "message": "no"}}).encode()], "invalid"),
        (502, [b"<html>bad gateway</html>"], "http_502"),
        (200, [event("a"), b"data: " + json.dumps(FULL).encode() + b"\n\n"], "queue_full"),
        (200, [event("a"), event("b")], "cut_off"),
    ],
)
async def test_failure_has_its_name(status: int, chunks: list[bytes], error: str) -> None:
    assert (await ask(status, chunks)).error == error


async def test_connection_that_nobody_takes_is_a_failure_with_a_name() -> None:
    async with serving(*GOOD) as server:
        url = server.url
    async with Client(Target(url, "m"), WORKLOAD) as client:
        assert (await client.ask([1], time.perf_counter())).error == "ClientConnectorError"


@pytest.mark.parametrize(
    ("full_length", "has", "lacks"),
    [
        (("min_tokens",), {"min_tokens": 3}, "ignore_eos"),
        (("ignore_eos",), {"ignore_eos": True}, "min_tokens"),
    ],
)
async def test_server_is_sent_what_it_knows_and_its_own_fields(
    full_length: tuple[str, ...], has: dict[str, Any], lacks: str
) -> None:
    async with serving(*GOOD) as server:
        target = Target(server.url, "m", "key", full_length, {"samplers": ["temperature"]})
        await send(target, WORKLOAD, requests=2, streams=1)
    for body, prompt in zip(server.bodies, WORKLOAD.prompts(2), strict=True):
        assert body["prompt"] == prompt
        assert body["max_tokens"] == 3
        assert body["samplers"] == ["temperature"]
        assert body.items() >= has.items()
        assert lacks not in body
    assert "authorization: bearer key" in server.heads[0]


@pytest.mark.parametrize("load", [{"streams": 2}, {"per_second": 500.0}])
async def test_failures_are_in_what_is_returned_when_a_load_is_sent(load: dict[str, Any]) -> None:
    async with serving(429, [json.dumps(FULL).encode()]) as server:
        done, wall_s = await send(Target(server.url, "m"), WORKLOAD, requests=5, **load)
    assert [one.error for one in done] == ["queue_full"] * 5
    assert wall_s > 0


async def test_measurement_is_refused_when_a_request_failed() -> None:
    async with serving(429, [json.dumps(FULL).encode()]) as server:
        measure: Callable[..., object] = run_load
        with pytest.raises(RuntimeError, match="queue_full: come again"):
            await asyncio.to_thread(measure, Target(server.url, "m"), WORKLOAD, 1, 1)
