"""What a tenant feels of another that sends a hundred times as much: its time to first token.

One mesh with the simulated engine and two tenants with a key each. `light` sends one request at a
time, first alone, then beside `flood`'s hundred streams, then alone again. The bar: p99 beside the
flood is at most twice p99 alone plus one step. The flood's own time to first token is the control:
in order of arrival, light would wait as long.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.load import Client, Target
from benchmarks.local_mesh import ROOT, simulated_mesh
from benchmarks.machine import describe, keep
from benchmarks.timeline import Timeline, percentile_ms
from benchmarks.workload import Workload

PROFILE = {
    "fixed_us": 50_000,
    "per_prefill_token_us": 20,
    "per_decode_row_us": 50,
    "per_context_token_us": 0,
}
LIGHT = Workload(prompt_tokens=64, output_tokens=2, seed=1)
FLOOD = Workload(prompt_tokens=64, output_tokens=16, seed=2)


def make_key(facts: dict[str, Any], tenant: str) -> str:
    """A new tenant's first key."""
    for words in (("tenants", "create", tenant), ("keys", "create", "--tenant", tenant)):
        done = subprocess.run(
            [sys.executable, "-m", "infermesh.cli", *words],
            cwd=ROOT,
            env={**os.environ, "XDG_STATE_HOME": facts["state_home"]},
            capture_output=True,
            text=True,
            check=True,
        )
    return done.stdout.strip()


class Tenant:
    """One key's client."""

    def __init__(self, facts: dict[str, Any], api_key: str, workload: Workload) -> None:
        target = Target(facts["url"], facts["models"][0], api_key)
        self.client = Client(target, workload)
        self._prompts = workload.endless()
        self.done: list[Timeline] = []

    async def ask(self) -> None:
        """One request."""
        answer = await self.client.ask(next(self._prompts), time.perf_counter())
        if answer.error is not None:
            raise RuntimeError(f"{answer.error}: {answer.message}")
        self.done.append(answer)

    async def ask_one_by_one(self, count: int) -> list[float]:
        """Seconds to the first token of each of `count` requests, at any moment of a step."""
        draw, before = random.Random(0), len(self.done)
        for _ in range(count):
            await asyncio.sleep(draw.random() * PROFILE["fixed_us"] / 1e6)
            await self.ask()
        return [one.ttft_s for one in self.done[before:]]

    async def flood(self) -> None:
        """One of many streams, until cancelled."""
        while True:
            await self.ask()


def known_ms(seconds: list[float], percentile: int) -> float:
    """Of at least one time."""
    found = percentile_ms(seconds, percentile)
    if found is None:
        raise ValueError("nothing was answered")
    return found


async def measure(facts: dict[str, Any], streams: int, requests: int) -> dict[str, Any]:
    """Alone, beside the flood, alone."""
    light = Tenant(facts, make_key(facts, "light"), LIGHT)
    flood = Tenant(facts, make_key(facts, "flood"), FLOOD)
    async with light.client, flood.client:
        await light.ask_one_by_one(5)  # whatever is built at first use
        alone = await light.ask_one_by_one(requests // 2)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(flood.flood()) for _ in range(streams)]
            await asyncio.sleep(3)
            began = len(flood.done)
            beside = await light.ask_one_by_one(requests)
            for task in running:
                task.cancel()
        alone += await light.ask_one_by_one(requests - requests // 2)
        others = flood.done[began:]
    step_ms = known_ms([gap for one in others for gap in one.gaps_s], 50)
    alone_ms, beside_ms = known_ms(alone, 99), known_ms(beside, 99)
    return {
        "flood_streams": streams,
        "requests": requests,
        "step_p50_ms": step_ms,
        "light_alone_ttft_p50_ms": known_ms(alone, 50),
        "light_alone_ttft_p99_ms": alone_ms,
        "light_beside_ttft_p50_ms": known_ms(beside, 50),
        "light_beside_ttft_p99_ms": beside_ms,
        "flood_ttft_p50_ms": known_ms([one.ttft_s for one in others], 50),
        "flood_requests": len(others),
        "bar_ms": round(2 * alone_ms + step_ms, 2),
        "within_bar": beside_ms <= 2 * alone_ms + step_ms,
    }


def main() -> None:
    """Measures, prints, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    slots = ("--set", f"scheduler.max_num_seqs={flags.max_num_seqs}")
    with simulated_mesh(PROFILE, *slots) as facts:
        measured = asyncio.run(measure(facts, flags.streams, flags.requests))
    result = {"machine": describe(), "profile_us": PROFILE, **measured}
    print(json.dumps(result, indent=2))
    keep(result, flags.json)


if __name__ == "__main__":
    main()
