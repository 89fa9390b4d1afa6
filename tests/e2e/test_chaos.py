"""Streams over two replicas whose processes are killed, stopped and cut off, one after another:
none lost, none doubled, no other token than without a fault, nothing left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.faults import cut, kill, stop, usable
from tests.e2e.mesh_process import Mesh, run_infermesh, wait_until

REPLICAS = 2
CLIENTS = 24
TOKENS = 120
TENANT = "acme"
# Different requests; each is asked again and again, and must always get the same answer.
CALLS = 12
FAULTS: Sequence[Callable[[Mesh, str], object]] = (kill, stop, cut)
VICTIMS = [f"{kind}-{number}" for kind in ("shard", "scheduler") for number in range(REPLICAS)]


def call(mesh: Mesh, number: int) -> dict[str, Any]:
    """Greedy and seeded ones, some with penalties, some with two choices."""
    options: dict[str, Any] = {"temperature": 0} if number % 2 else {"temperature": 1.0}
    if number % 3 == 0:
        options |= {"frequency_penalty": 0.5, "presence_penalty": 0.2}
    return {
        "model": mesh.model,
        "messages": [{"role": "user", "content": f"Count from {number} to {number + 30}"}],
        "max_tokens": TOKENS,
        "seed": number,
        "n": 2 if number % 4 == 0 else 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "extra_body": {"ignore_eos": True},
        **options,
    }


@dataclass
class Answer:
    """What a client received."""

    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    tokens: int = 0


async def ask(client: openai.AsyncOpenAI, request: dict[str, Any], user: str = "") -> Answer:
    """One stream to its end; `user` keeps it from sharing another one's generation."""
    answer = Answer()
    async for chunk in await client.chat.completions.create(**request, user=user):
        if chunk.usage is not None:
            answer.tokens = chunk.usage.prompt_tokens + chunk.usage.completion_tokens
        for choice in chunk.choices:
            answer.texts.setdefault(choice.index, "")
            answer.texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                assert choice.index not in answer.reasons, "a choice finished twice"
                answer.reasons[choice.index] = choice.finish_reason
    return answer


class Crowd:
    """Clients that ask until enough was answered and they are told to stop."""

    def __init__(self, mesh: Mesh, api_key: str, expected: list[Answer], at_least: int) -> None:
        self._mesh = mesh
        self._api_key = api_key
        self._expected = expected
        self._at_least = at_least
        self._numbers = itertools.count()
        self._stopping = False
        self.answers: list[Answer] = []
        self.wrong: list[str] = []

    async def run(self) -> None:
        async with (
            self._mesh.async_openai(max_retries=0, timeout=300.0) as anyone,
            asyncio.TaskGroup() as tasks,
        ):
            client = anyone.with_options(api_key=self._api_key)
            for _ in range(CLIENTS):
                tasks.create_task(self._ask_on(client))

    def stop(self) -> None:
        self._stopping = True

    async def _ask_on(self, client: openai.AsyncOpenAI) -> None:
        while not self._stopping or len(self.answers) < self._at_least:
            number = next(self._numbers)
            index = number % CALLS
            try:
                answer = await ask(client, call(self._mesh, index), f"client-{number}")
            except openai.APIError as error:
                self.wrong.append(f"stream {number} was lost: {error}")
                continue
            self.answers.append(answer)
            if answer != self._expected[index]:
                self.wrong.append(f"stream {number}: {answer} is not {self._expected[index]}")


def next_faults(count: int) -> Iterator[tuple[Callable[[Mesh, str], object], str]]:
    """Every fault with every victim in turn, in an order of chance that each run repeats."""
    pairs = list(itertools.product(FAULTS, VICTIMS))
    random.Random(4).shuffle(pairs)
    return itertools.islice(itertools.cycle(pairs), count)


def all_usable(mesh: Mesh) -> bool:
    return all(usable(mesh, number) for number in range(REPLICAS))


async def live_through(mesh: Mesh, num_faults: int, num_streams: int) -> None:
    api_key = narrow_tenant(mesh)
    async with mesh.async_openai(max_retries=0, timeout=300.0) as anyone:
        client = anyone.with_options(api_key=api_key)
        expected = [await ask(client, call(mesh, index)) for index in range(CALLS)]
    crowd = Crowd(mesh, api_key, expected, num_streams)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(crowd.run())
        try:
            for fault, victim in next_faults(num_faults):
                await asyncio.to_thread(fault, mesh, victim)
                await asyncio.to_thread(wait_until, lambda: all_usable(mesh), 90.0, "recovery")
        finally:
            crowd.stop()
    assert not crowd.wrong, crowd.wrong[:3]
    assert len(crowd.answers) >= num_streams
    assert mesh.metric("gateway", "failovers_total") > 0
    received = sum(answer.tokens for answer in [*expected, *crowd.answers])
    nothing_is_left(mesh, len(expected) + len(crowd.answers), received)
    await every_place_is_free(mesh, api_key)


def narrow_tenant(mesh: Mesh) -> str:
    """The key of a tenant that may have as many requests at once as there are clients."""
    for words in (
        ("tenants", "create", TENANT, "--max-concurrency", str(CLIENTS)),
        ("keys", "create", "--tenant", TENANT),
    ):
        done = run_infermesh(mesh.tmp_path, *words)
        assert done.returncode == 0, done.stderr
    return done.stdout.strip()


async def every_place_is_free(mesh: Mesh, api_key: str) -> None:
    """A place that a fault had leaked would be missing for ever."""
    async with (
        mesh.async_openai(max_retries=0, timeout=300.0) as anyone,
        asyncio.TaskGroup() as tasks,
    ):
        client = anyone.with_options(api_key=api_key)
        for number in range(CLIENTS):
            tasks.create_task(ask(client, call(mesh, number % CALLS), f"last-{number}"))


def nothing_is_left(mesh: Mesh, num_requests: int, num_tokens: int) -> None:
    """No block, no place of a tenant, no request; and each was billed once."""
    for number in range(REPLICAS):
        name = f"scheduler-{number}"
        with contextlib.suppress(AssertionError):  # it served nothing since it was restarted
            wait_until(lambda name=name: mesh.metric(name, "num_blocks_used") == 0, 30.0)
        assert mesh.metric(name, "num_requests_running") == 0
        assert mesh.metric(name, "num_requests_waiting") == 0
        assert mesh.metric(name, "num_blocks_used") == 0

    def ledger(what: str) -> int:
        command = ("usage", "--tenant", TENANT, "--json")
        shown = json.loads(run_infermesh(mesh.tmp_path, *command).stdout)
        return sum(total[what] for total in shown)

    wait_until(lambda: ledger("requests") >= num_requests, 30.0)
    assert ledger("requests") == num_requests
    assert ledger("prompt_tokens") + ledger("completion_tokens") == num_tokens


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_no_stream_notices_any_of_twenty_four_faults(tmp_path: Path) -> None:
    with Mesh(tmp_path, "--deterministic", "--no-cache", "--replicas", str(REPLICAS)) as mesh:
        await live_through(mesh, num_faults=24, num_streams=200)


async def test_no_stream_notices_that_replicas_come_and_go(tmp_path: Path) -> None:
    flags = ("--engine", "simulated", "--no-cache", "--replicas", str(REPLICAS))
    with Mesh(tmp_path, *flags) as mesh:
        await live_through(mesh, num_faults=6, num_streams=40)
