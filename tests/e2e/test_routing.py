"""Requests follow their prefix over replicas of a simulated mesh, and replicas come and go."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from benchmarks.prefix_routing import Fleet, Workload, converse, count
from tests.e2e.mesh_process import Mesh, environment, wait_until

REPLICAS = 3
TALK = Workload(conversations=9, turns=10, system_words=150, user_words=12, concurrency=3)
# All together have room for every conversation, each alone for two in five.
KEPT = Fleet(REPLICAS, num_blocks=170)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Three replicas that compute nothing."""
    with Mesh(tmp_path_factory.mktemp("mesh"), *KEPT.flags("prefix")) as mesh:
        yield mesh


def test_conversations_are_computed_once_when_they_follow_their_prefix(
    mesh: Mesh, tmp_path: Path
) -> None:
    asyncio.run(converse(mesh.facts, TALK))
    by_prefix = count(mesh.facts)
    with Mesh(tmp_path, *KEPT.flags("round_robin")) as other:
        asyncio.run(converse(other.facts, TALK))
        in_turn = count(other.facts)
    computed = "prompt_tokens_computed_total"
    assert by_prefix[computed] <= 0.6 * in_turn[computed]
    # and that is why: the gateway knew, and the schedulers found it there
    saved = in_turn[computed] - by_prefix[computed]
    assert by_prefix["prefix_cache_hits_total"] - in_turn["prefix_cache_hits_total"] >= 0.8 * saved
    assert by_prefix["prefix_matched_tokens_total"] >= 0.8 * by_prefix["prefix_cache_hits_total"]
    assert mesh.metric("gateway", "prefix_routed_total", outcome="hit") >= TALK.conversations
    assert in_turn["prefix_matched_tokens_total"] == 0


@contextmanager
def gateway(folder: Path, replicas_file: Path) -> Iterator[dict[str, str]]:
    """One more gateway, which finds its replicas in a file."""
    announced = folder / "gateway.json"
    flags = {
        "gateway.http_address": "127.0.0.1:0",
        "gateway.admin_address": "127.0.0.1:0",
        "gateway.grpc_address": "127.0.0.1:0",
        "gateway.replicas_file": replicas_file,
        "gateway.discovery_interval_s": 0.1,
        "telemetry.announce_file": announced,
    }
    command = [sys.executable, "-m", "gateway", *(f"--{k}={v}" for k, v in flags.items())]
    with (folder / "gateway.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(folder), stdout=log, stderr=log
        )
    try:
        wait_until(lambda: announced.exists() or process.poll() is not None, 30)
        assert process.poll() is None, (folder / "gateway.log").read_text()
        yield json.loads(announced.read_text())
    finally:
        process.terminate()
        process.wait(30)


class Load:
    """Four clients, each asking again and again."""

    def __init__(self, url: str, model: str) -> None:
        self.num_done = 0
        self.failures: list[Exception] = []
        self._model = model
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        self._stopping = asyncio.Event()

    async def __aenter__(self) -> "Load":
        self._tasks = [asyncio.ensure_future(self._ask(i)) for i in range(4)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping.set()
        await asyncio.gather(*self._tasks)
        await self._client.close()

    async def _ask(self, number: int) -> None:
        while not self._stopping.is_set():
            try:
                answer = await self._client.completions.create(
                    model=self._model, prompt=f"Client {number}", max_tokens=16, temperature=1.0
                )
                assert answer.usage is not None
                assert answer.usage.completion_tokens == 16
            except Exception as exc:
                self.failures.append(exc)
                return
            self.num_done += 1

    async def until_more(self, more: int = 20) -> None:
        """So many requests later."""
        wanted = self.num_done + more
        await asyncio.to_thread(
            wait_until, lambda: self.num_done >= wanted or bool(self.failures), 60
        )


async def test_no_request_fails_when_a_replica_is_added_and_another_removed(
    mesh: Mesh, tmp_path: Path
) -> None:
    def generated(index: int) -> float:
        return mesh.metric(f"scheduler-{index}", "generation_tokens_total")

    first, second = (str(mesh.service(f"scheduler-{i}")["address"]) for i in (0, 1))
    replicas = tmp_path / "replicas"
    replicas.write_text(f"{first}\n")
    began = [generated(0), generated(1)]
    with gateway(tmp_path, replicas) as facts:
        url, admin = (f"http://{facts[name]}" for name in ("http_address", "admin_address"))

        def knows(*addresses: str) -> bool:
            listed = httpx.get(f"{admin}/debug/replicas").json()
            return [one["address"] for one in listed if one["routable"]] == list(addresses)

        def exposed() -> str:
            return httpx.get(f"{admin}/metrics").text

        wait_until(lambda: knows(first), 30)
        async with Load(url, mesh.model) as load:
            await load.until_more()
            assert generated(1) == began[1]
            replicas.write_text(f"{first}\n{second}\n")
            await asyncio.to_thread(wait_until, lambda: knows(first, second), 30)
            await load.until_more()
            replicas.write_text(f"{second}\n")
            await asyncio.to_thread(wait_until, lambda: knows(second), 30)
            await asyncio.to_thread(
                wait_until, lambda: mesh.metric("scheduler-0", "num_requests_running") == 0, 30
            )
            alone = [generated(0), generated(1)]
            await load.until_more()
            assert generated(0) == alone[0]
            assert generated(1) > alone[1]
        assert load.failures == []
        assert alone[0] > began[0]
        assert alone[1] > began[1]
        assert "infermesh_replicas_known 1.0" in exposed()
