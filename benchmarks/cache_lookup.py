"""Latency of cache lookups over a unix socket: exact, semantic and missed, beside many entries.

The service runs in this process; its embedder has a thread of its own, as in a mesh.
"""

import argparse
import asyncio
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.machine import describe, keep
from infermesh import rpc
from infermesh.config import CacheConfig
from infermesh.v1 import sampling_pb2
from infermesh.v1 import semantic_cache_admin_service_pb2 as admin_pb
from infermesh.v1 import semantic_cache_admin_service_pb2_grpc as admin_grpc
from infermesh.v1 import semantic_cache_service_pb2 as pb
from infermesh.v1 import semantic_cache_service_pb2_grpc as pb_grpc
from services.cache.service import CacheService

_CONTEXT = hashlib.sha256(b"context").digest()
_BATCH = 500


def question(number: int) -> str:
    """One of as many different questions as there are numbers."""
    topics = ("capital", "population", "history", "climate", "currency", "flag", "food", "music")
    return f"What is the {topics[number % 8]} of country {number // 8}?"


def reworded(number: int) -> str:
    """The same question, put otherwise and not asked before."""
    return question(number).replace("What is", "what's").replace("?", " exactly?")


def fields(text: str) -> dict[str, object]:
    """What a query and an entry have in common."""
    return {
        "exact_fingerprint": hashlib.sha256(text.encode()).digest(),
        "compatibility_fingerprint": _CONTEXT,
        "tenant": "bench",
        "sharing_domain": "bench",
        "model_id": "demo",
        "model_fingerprint": "demo",
        "text": text,
        "traits": pb.RequestTraits(semantic_enabled=True, n=1),
    }


class Bench:
    """One service and its streams."""

    def __init__(self, address: str) -> None:
        channel = rpc.channel(address)
        self._cache = pb_grpc.SemanticCacheServiceStub(channel)
        self._admin = admin_grpc.SemanticCacheAdminServiceStub(channel)
        self._lookups = self._cache.Lookup(wait_for_ready=True)

    async def fill(self, num_entries: int) -> float:
        """Stores and waits until all are indexed; entries per second."""
        choice = pb.AnswerChoice(token_ids=range(64), finish_reason=sampling_pb2.FINISH_REASON_STOP)
        answer = pb.Answer(choices=[choice], compute_seconds=0.2)
        began = time.perf_counter()
        facts = await self._cache.GetEmbedder(pb.GetEmbedderRequest(), wait_for_ready=True)
        for start in range(0, num_entries, _BATCH):
            numbers = range(start, min(start + _BATCH, num_entries))
            entries = (
                pb.Entry(**fields(question(i)), answer=answer, mark=facts.mark) for i in numbers
            )
            requests = (pb.StoreRequest(entry=one) for one in entries)
            await self._cache.Store(requests, wait_for_ready=True)
        while True:
            stats = await self._admin.GetStats(admin_pb.GetStatsRequest())
            if stats.num_semantic_entries >= num_entries:
                return num_entries / (time.perf_counter() - began)
            await asyncio.sleep(0.1)

    async def time(self, texts: Iterable[str], outcome: int) -> dict[str, float]:
        """Milliseconds of one lookup after another."""
        times = []
        for number, text in enumerate(texts):
            query = pb.Query(lookup_id=number, **fields(text))
            began = time.perf_counter()
            await self._lookups.write(pb.LookupRequest(query=query))
            response = await self._lookups.read()
            times.append(1e3 * (time.perf_counter() - began))
            if response.outcome != outcome:
                raise SystemExit(f"{text!r} came out as {response}")
        cuts = statistics.quantiles(times, n=20)
        return {"p50_ms": round(statistics.median(times), 2), "p95_ms": round(cuts[18], 2)}

    async def burst(self, texts: list[str]) -> float:
        """Lookups per second where all are asked at once."""
        began = time.perf_counter()
        for number, text in enumerate(texts):
            query = pb.Query(lookup_id=number, **fields(text))
            await self._lookups.write(pb.LookupRequest(query=query))
        for _ in texts:
            await self._lookups.read()
        return len(texts) / (time.perf_counter() - began)


async def run(num_entries: int, num_lookups: int) -> dict[str, object]:
    """One filled cache, measured."""
    with tempfile.TemporaryDirectory() as folder:
        config = CacheConfig(
            address=f"unix:{folder}/cache.sock",
            data_dir=f"{folder}/data",
            lookup_deadline_ms=60_000.0,
        )
        service = CacheService(config)
        async with asyncio.TaskGroup() as tasks:
            background = tasks.create_task(_serve(service))
            bench = Bench(config.address)
            filled = await bench.fill(num_entries)
            some = [num_entries * i // num_lookups for i in range(num_lookups)]
            result = {
                "num_entries": num_entries,
                "stored_and_indexed_per_s": round(filled),
                "exact": await bench.time(map(question, some), pb.LOOKUP_OUTCOME_HIT_EXACT),
                "semantic": await bench.time(map(reworded, some), pb.LOOKUP_OUTCOME_HIT_SEMANTIC),
                "miss": await bench.time(
                    (f"How many rivers has planet {i}?" for i in some), pb.LOOKUP_OUTCOME_MISS
                ),
                "semantic_burst_per_s": round(
                    await bench.burst([f"Why is river {i} so long?" for i in some])
                ),
            }
            background.cancel()
        await service.stop()
    return result


async def _serve(service: CacheService) -> None:
    async with asyncio.TaskGroup() as tasks:
        await service.start(tasks)


def main() -> None:
    """Prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--lookups", type=int, default=200)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    measured = asyncio.run(run(flags.entries, flags.lookups))
    result = {"machine": describe(), **measured}
    print(json.dumps(result, indent=2))
    keep(result, flags.json)


if __name__ == "__main__":
    main()
