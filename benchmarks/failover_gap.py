"""The longest silence of a stream whose shard or scheduler is killed while a spare replica serves.

One mesh of two replicas with the demo model. In each repetition four streams run, the replica that
has most of them loses a process, and every stream is read to its end. The bar is 2 s for a shard.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import time
import urllib.request
from pathlib import Path
from typing import Any

import openai
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.local_mesh import local_mesh
from benchmarks.machine import describe, keep

BAR_S = 2.0
NUM_STREAMS = 4
TOKENS = 400
RECOVERY_S = 60.0


def main() -> None:
    """Prints and keeps the gaps of every repetition."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    flags_of_mesh = ("--replicas", "2", "--no-cache", "--no-auth")
    with local_mesh(*flags_of_mesh) as facts:
        gaps = asyncio.run(_measure(facts, flags.repetitions))
    result = {
        "machine": describe(),
        "bar_s": BAR_S,
        "streams": NUM_STREAMS,
        "faults": {victim: _summary(values) for victim, values in gaps.items()},
    }
    print(json.dumps(result, indent=2))
    keep(result, flags.json)


def _summary(gaps: list[float]) -> dict[str, Any]:
    return {
        "longest_gap_s": [round(gap, 3) for gap in gaps],
        "median_s": round(statistics.median(gaps), 3),
        "worst_s": round(max(gaps), 3),
    }


async def _measure(facts: dict[str, Any], repetitions: int) -> dict[str, list[float]]:
    gaps: dict[str, list[float]] = {"none": [], "shard": [], "scheduler": []}
    for _ in range(repetitions):
        for victim, seen in gaps.items():
            await _wait_serving(facts)
            seen.append(await _one(facts, victim))
    return gaps


async def _one(facts: dict[str, Any], victim: str) -> float:
    """The longest gap between two chunks of any stream."""
    begun = [asyncio.Event() for _ in range(NUM_STREAMS)]
    url = f"{facts['url']}/v1"
    options = {"api_key": facts["api_key"], "max_retries": 0, "timeout": 120}
    async with openai.AsyncOpenAI(base_url=url, **options) as client, asyncio.TaskGroup() as tasks:
        streams = [
            tasks.create_task(_longest_gap(client, facts["models"][0], seed, event))
            for seed, event in enumerate(begun)
        ]
        await asyncio.gather(*(event.wait() for event in begun))
        if victim != "none":
            os.kill(_pid(facts, f"{victim}-{_busiest(facts)}"), signal.SIGKILL)
    return max(task.result() for task in streams)


async def _longest_gap(
    client: openai.AsyncOpenAI, model: str, seed: int, begun: asyncio.Event
) -> float:
    longest, seen_at, num_chunks = 0.0, None, 0
    async for _ in await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"Count from {seed}"}],
        max_tokens=TOKENS,
        temperature=1.0,
        seed=seed,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        now = time.perf_counter()
        if seen_at is not None:
            longest = max(longest, now - seen_at)
        seen_at = now
        num_chunks += 1
        if num_chunks > 20:
            begun.set()
    return longest


def _pid(facts: dict[str, Any], name: str) -> int:
    """Of the process as it is now: it may have been restarted."""
    folder = Path(_service(facts, name)["address"].removeprefix("unix:")).parent
    announced = json.loads((folder / f"{name}.json").read_text())
    return int(announced["pid"])


def _service(facts: dict[str, Any], name: str) -> dict[str, Any]:
    return next(service for service in facts["services"] if service["name"] == name)


def _busiest(facts: dict[str, Any]) -> int:
    """The replica that most of the gateway's requests are at."""
    with urllib.request.urlopen(f"{facts['admin_url']}/metrics") as response:
        families = text_string_to_metric_families(response.read().decode())
    inflight = {
        sample.labels["replica"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == "infermesh_replica_inflight"
    }
    addresses = [_service(facts, f"scheduler-{i}")["address"] for i in (0, 1)]
    return max((0, 1), key=lambda i: inflight[addresses[i]])


async def _wait_serving(facts: dict[str, Any]) -> None:
    """Until both replicas compute, as the gateway sees them."""
    deadline = time.monotonic() + RECOVERY_S
    while not _all_serve(facts):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the replicas did not recover within {RECOVERY_S} s")
        await asyncio.sleep(0.05)


def _all_serve(facts: dict[str, Any]) -> bool:
    with urllib.request.urlopen(f"{facts['admin_url']}/debug/replicas") as response:
        replicas = json.loads(response.read())
    return all(one["routable"] and one["state"] == "serving" for one in replicas)


if __name__ == "__main__":
    main()
