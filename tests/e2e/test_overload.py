"""Tenants and overload through HTTP: who floods waits, who is told when to come back gets in."""

import asyncio
import contextlib
import json
import math
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.e2e.mesh_process import Mesh, run_infermesh

STEP_S = 0.02
SLOTS = 16
TOKENS = 8
# Three times what is got done of so many tokens are requests that gateway and clients keep up with.
LONGER = 16
PROMPT = 32
# Prompts that the queue holds. Normal priority may fill four fifths of it, and a tenant leaves a
# fifth of that to others.
QUEUE = 64
TENANTS_QUEUE = math.ceil(0.8 * 0.8 * QUEUE)
# What SLOTS sequences of LONGER steps get done.
CAPACITY = SLOTS / (LONGER * STEP_S)
# In seconds and capacities: the rate is known before many are refused.
LOADS = ((0.5, 1.2), (0.8, 3.0))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """One replica, auth on, steps of 20 ms, room in the queue for QUEUE prompts."""
    folder: Path = tmp_path_factory.mktemp("overload")
    profile = folder / "profile.json"
    nothing = dict.fromkeys(
        ("per_prefill_token_us", "per_decode_row_us", "per_context_token_us"), 0
    )
    profile.write_text(json.dumps({"fixed_us": STEP_S * 1e6, **nothing}))
    flags = ["--no-cache", "--engine", "simulated"]
    for setting in (
        f"shard.simulated_profile={profile}",
        f"scheduler.max_num_seqs={SLOTS}",
        f"scheduler.max_queue_tokens={QUEUE * PROMPT}",
    ):
        flags += ["--set", setting]
    with Mesh(folder, *flags) as running:
        yield running


@dataclass
class Caller:
    """A key's client, and what it saw."""

    mesh: Mesh
    api_key: str
    num_tokens: int = TOKENS
    first_chunk_s: list[float] = field(default_factory=list)
    refusals: list[httpx.Response] = field(default_factory=list)
    draw: random.Random = field(default_factory=random.Random)

    async def ask(self, client: httpx.AsyncClient, max_tries: int = 1) -> int:
        """One streamed completion, tried again when the mesh said to; tries it took, 0: gave up."""
        prompt = [self.draw.randrange(300, 2000) for _ in range(PROMPT)]
        for number in range(1, max_tries + 1):
            response = await self.try_once(client, prompt)
            if response is None:
                return number
            self.refusals.append(response)
            # what is tested: a client that comes back when it was told to
            await asyncio.sleep(float(response.headers["retry-after-ms"]) / 1000)
        return 0

    async def try_once(self, client: httpx.AsyncClient, prompt: list[int]) -> httpx.Response | None:
        """None where it was answered to its end."""
        body = {
            "model": self.mesh.model,
            "prompt": prompt,
            "max_tokens": self.num_tokens,
            "min_tokens": self.num_tokens,
            "temperature": 1.0,
            "stream": True,
        }
        began = time.perf_counter()
        url = f"{self.mesh.facts['url']}/v1/completions"
        headers = {"authorization": f"Bearer {self.api_key}"}
        async with client.stream("POST", url, json=body, headers=headers) as response:
            if response.status_code != 200:
                await response.aread()
                return response
            lines = [line async for line in self._timed(response, began)]
        assert lines[-1] == "data: [DONE]", lines[-1]
        assert not any('"error"' in line for line in lines), "an accepted request failed"
        return None

    async def _timed(self, response: httpx.Response, began: float) -> AsyncIterator[str]:
        is_first = True
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if is_first:
                self.first_chunk_s.append(time.perf_counter() - began)
                is_first = False
            yield line


def caller(mesh: Mesh, tenant: str, num_tokens: int = TOKENS) -> Caller:
    """Of a new tenant."""
    for words in (("tenants", "create", tenant), ("keys", "create", "--tenant", tenant)):
        done = run_infermesh(mesh.tmp_path, *words)
        assert done.returncode == 0, done.stderr
    return Caller(mesh, done.stdout.strip(), num_tokens)


def new_client() -> httpx.AsyncClient:
    """One per stream of requests: a pool that many share makes them wait for each other."""
    return httpx.AsyncClient(timeout=60, verify=False)


async def test_tenant_hardly_feels_another_that_sends_a_hundred_times_as_much(mesh: Mesh) -> None:
    light, flood = caller(mesh, "light"), caller(mesh, "flood")
    overtakes = mesh.metric("scheduler-0", "fair_order_overtakes_total")
    async with new_client() as client, new_client() as second:

        async def flooding() -> None:
            async with new_client() as client:
                while True:
                    await flood.ask(client, max_tries=100)

        async with asyncio.TaskGroup() as tasks:
            streams = [tasks.create_task(flooding()) for _ in range(80)]
            while len(flood.first_chunk_s) < 2 * SLOTS:
                await light.ask(client, max_tries=3)
            flood.first_chunk_s.clear()
            slower: list[float] = []
            for _ in range(15):
                light.first_chunk_s.clear()
                pair = await asyncio.gather(light.ask(client), light.ask(second))
                assert pair == [1, 1], "refused for the other's flood"
                slower.append(max(light.first_chunk_s))
            for stream in streams:
                stream.cancel()
    # for the first of a pair a slot is kept, the second gets the next one: in order of arrival it
    # would wait as long as the flood does
    assert statistics.median(slower) < 0.7 * statistics.median(flood.first_chunk_s)
    assert mesh.metric("scheduler-0", "fair_order_overtakes_total") > overtakes


@pytest.mark.slow  # and wants a machine that others leave alone: rates are measured within a second
async def test_obedient_clients_get_in_and_accepted_requests_finish_at_three_times_the_capacity(
    mesh: Mesh,
) -> None:
    crowd = caller(mesh, "crowd", LONGER)
    tries: list[int] = []
    async with contextlib.AsyncExitStack() as stack:
        # made before the load begins: making one takes longer than the load leaves between two
        clients = [await stack.enter_async_context(new_client()) for _ in range(50)]

        async def one(client: httpx.AsyncClient) -> None:
            tries.append(await crowd.ask(client, max_tries=4))

        async with asyncio.TaskGroup() as tasks:
            for duration_s, factor in LOADS:
                began, rate = time.perf_counter(), factor * CAPACITY
                for number in range(int(rate * duration_s)):  # open loop
                    tasks.create_task(one(clients[number % len(clients)]))
                    # the pace of arrivals is what makes it an overload
                    await asyncio.sleep(began + (number + 1) / rate - time.perf_counter())
    assert crowd.refusals, "that was no overload"
    for response in crowd.refusals:
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "queue_full"
        assert 0 < float(response.headers["retry-after-ms"]) <= 60_000
    assert all(tries), f"{tries.count(0)} of {len(tries)} never got in"
    came_back = [count for count in tries if count > 1]
    assert came_back.count(2) >= 0.8 * len(came_back), sorted(came_back)
    assert mesh.metric("scheduler-0", "num_tokens_queued") == 0
    assert mesh.metric("scheduler-0", "tenants_remembered") == 0


async def test_low_priority_is_shed_first(mesh: Mesh) -> None:
    shed = caller(mesh, "shed")
    async with new_client() as client, contextlib.AsyncExitStack() as streams:

        async def status(number: int, priority: str) -> int:
            """Of a stream that outlives the test; its headers come when it is let in."""
            body = {
                "model": mesh.model,
                "prompt": [300 + number] * PROMPT,
                "max_tokens": 40 * TOKENS,
                "min_tokens": 40 * TOKENS,
                "priority": priority,
                "stream": True,
            }
            url = f"{mesh.facts['url']}/v1/completions"
            headers = {"authorization": f"Bearer {shed.api_key}"}
            request = client.stream("POST", url, json=body, headers=headers)
            return (await streams.enter_async_context(request)).status_code

        number = 0
        while await status(number, "normal") == 200:
            number += 1
            assert number <= SLOTS + TENANTS_QUEUE, "the queue has no bound"
        assert await status(number + 1, "low") == 429
        assert await status(number + 2, "high") == 200
