"""Every process of a mesh is replaced under load, and no client notices."""

import asyncio
import json
from collections import Counter
from pathlib import Path

import httpx
import openai

from tests.e2e.mesh_process import Mesh, run_infermesh, wait_until

CLIENTS = 8
TOKENS = 40
SEEDS = 5
PROCESSES = {"auth", "cache", "scheduler-0", "scheduler-1", "shard-0", "shard-1", "gateway"}


class Load:
    """Clients that ask again and again, over connections that they keep, and never retry."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.began = asyncio.Event()
        self.stopping = asyncio.Event()
        self.texts: dict[int, set[str]] = {seed: set() for seed in range(SEEDS)}
        self.outcomes: Counter[str] = Counter()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                tasks.create_task(self._ask_on(number))

    async def _ask_on(self, number: int) -> None:
        async with self._mesh.async_openai(max_retries=0) as client:
            while not self.stopping.is_set():
                number += 1
                try:
                    text = await self._ask(client, number % SEEDS)
                except (openai.APIError, httpx.HTTPError) as error:
                    self.outcomes[f"{type(error).__name__}: {error}"] += 1
                else:
                    self.outcomes["ok"] += 1
                    self.began.set()
                    self.texts[number % SEEDS].add(text)

    async def _ask(self, client: openai.AsyncOpenAI, seed: int) -> str:
        text = ""
        async for chunk in await client.completions.create(
            model=self._mesh.model,
            prompt="Anything",
            temperature=1,
            seed=seed,
            max_tokens=TOKENS,
            stream=True,
        ):
            text += chunk.choices[0].text if chunk.choices else ""
        return text


def billed(tmp_path: Path) -> int:
    """Requests in the ledger; gateways send them in the background."""
    usage = run_infermesh(tmp_path, "usage", "--json")
    return sum(total["requests"] for total in json.loads(usage.stdout))


async def test_no_request_fails_while_every_process_is_replaced(tmp_path: Path) -> None:
    with Mesh(tmp_path, "--engine", "simulated", "--replicas", "2") as mesh:
        wait_until(lambda: len(mesh.facts["services"]) == len(PROCESSES), 60.0)
        load = Load(mesh)
        before = {service["name"]: service["pid"] for service in mesh.facts["services"]}
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load.run())
            await load.began.wait()
            restarted = await asyncio.to_thread(run_infermesh, tmp_path, "restart", timeout_s=120.0)
            load.stopping.set()
        assert restarted.returncode == 0, restarted.stderr
        assert "restarted all processes" in restarted.stdout
        after = {service["name"]: service["pid"] for service in mesh.facts["services"]}
        assert set(after) == PROCESSES
        assert not set(before.values()) & set(after.values())
        assert list(load.outcomes) == ["ok"], load.outcomes
        assert all(len(texts) == 1 for texts in load.texts.values())
        wait_until(lambda: billed(tmp_path) >= load.outcomes["ok"], 20.0)
        assert billed(tmp_path) == load.outcomes["ok"]


def test_restart_says_in_one_sentence_that_no_mesh_runs(tmp_path: Path) -> None:
    refused = run_infermesh(tmp_path, "restart")
    assert refused.returncode == 1
    assert refused.stderr == (
        "error: no mesh runs on this machine; start one with `infermesh up`\n"
    )
