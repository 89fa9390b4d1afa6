"""`python -m services.cache` as a process: killed at any moment, it loses nothing promised."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from infermesh import rpc
from infermesh.v1 import semantic_cache_admin_service_pb2 as admin_pb
from infermesh.v1 import semantic_cache_service_pb2 as pb
from tests.contract.cache.harness import DEADLINE_S, Client, entry, names, query

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "What is the secret colour of the sky?"


class Process:
    """One cache process and a client to it."""

    def __init__(self, process: asyncio.subprocess.Process, client: Client) -> None:
        self._process = process
        self.client = client

    async def end(self, number: signal.Signals) -> tuple[int, str]:
        """Exit status, and what it wrote to stderr."""
        self._process.send_signal(number)
        _, stderr = await asyncio.wait_for(self._process.communicate(), DEADLINE_S)
        assert self._process.returncode is not None
        return self._process.returncode, stderr.decode()


@asynccontextmanager
async def cache_process(folder: Path, **settings: Any) -> AsyncIterator[Process]:
    address = f"unix:{folder}/cache.sock"
    fields = {"address": address, "data_dir": f"{folder}/data", "embedder": "none", **settings}
    flags = [f"--cache.{name}={value}" for name, value in fields.items()]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.cache", *flags, cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with rpc.channel(address) as channel:
            client = Client(channel)
            await client.cache.GetEmbedder(
                pb.GetEmbedderRequest(), wait_for_ready=True, timeout=DEADLINE_S
            )
            yield Process(process, client)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def test_entries_are_back_when_the_process_is_killed(tmp_path: Path) -> None:
    async with cache_process(tmp_path) as cache:
        offered = [entry(f"{QUESTION} {i}") for i in range(500)]
        assert await cache.client.store(*offered) == {"STORED": 500}
        status, _ = await cache.end(signal.SIGKILL)
        assert status == -signal.SIGKILL
    async with cache_process(tmp_path) as cache:
        found = await cache.client.look_up(*(query(i, f"{QUESTION} {i}") for i in range(500)))
        assert {names(one)[0] for one in found} == {"HIT_EXACT"}
        assert [one.answer for one in found] == [one.answer for one in offered]
        status, stderr = await cache.end(signal.SIGTERM)
        assert status == 0
    lines = [json.loads(line) for line in stderr.splitlines()]
    assert any(line["message"] == "the cache is warm" for line in lines)
    assert "secret colour" not in stderr, "a text is in the logs"


@pytest.mark.parametrize("damage", ["cut", "flip"])
async def test_a_damaged_log_costs_one_entry_at_most(tmp_path: Path, damage: str) -> None:
    async with cache_process(tmp_path) as cache:
        await cache.client.store(*(entry(f"{QUESTION} {i}") for i in range(9)))
        await cache.end(signal.SIGKILL)
    log = tmp_path / "data" / "000001.log"
    data = bytearray(await asyncio.to_thread(log.read_bytes))
    if damage == "cut":
        del data[-5:]
    else:
        data[len(data) // 2] ^= 4
    await asyncio.to_thread(log.write_bytes, bytes(data))
    async with cache_process(tmp_path) as cache:
        found = await cache.client.look_up(*(query(i, f"{QUESTION} {i}") for i in range(9)))
        hits = [names(one)[0] == "HIT_EXACT" for one in found]
        assert sum(hits) == 8
        assert all(one.answer == entry("").answer for one in found if one.entry_id)
        stats = await cache.client.admin.GetStats(admin_pb.GetStatsRequest())
        assert stats.num_corrupt_records == (damage == "flip")
        _, stderr = await cache.end(signal.SIGTERM)
    warnings = [line for line in map(json.loads, stderr.splitlines()) if line["level"] != "info"]
    assert len(warnings) == 1
    assert "Traceback" not in stderr


async def test_a_second_cache_is_refused_when_the_folder_is_taken(tmp_path: Path) -> None:
    async with cache_process(tmp_path):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.cache", "--cache.embedder=none"),
            *(f"--cache.data_dir={tmp_path}/data", f"--cache.address=unix:{tmp_path}/other.sock"),
            cwd=ROOT,
            stderr=asyncio.subprocess.PIPE,
        )
        _, stderr = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert process.returncode == 1
        assert "is in use by another cache" in stderr.decode().splitlines()[-1]
