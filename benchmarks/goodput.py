"""Goodput under overload: answers that are complete within their own deadline, per second.

Open-loop load (Poisson arrivals) at multiples of the capacity of one replica with the simulated
engine, through HTTP. The bar: goodput at three times the capacity is at least 0.9 of the best, and
queue and memory stay where they are. Capacity is what a closed loop gets done.
"""

import argparse
import asyncio
import json
import random
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.load import Client, Target, closed_loop, lasting, open_loop
from benchmarks.local_mesh import simulated_mesh
from benchmarks.machine import describe, keep
from benchmarks.timeline import Timeline, percentile_ms
from benchmarks.workload import Prompt, Workload

PROFILE = {
    "fixed_us": 50_000,
    "per_prefill_token_us": 20,
    "per_decode_row_us": 100,
    "per_context_token_us": 0,
}
WORKLOAD = Workload(prompt_tokens=64, output_tokens=16)
LEVELS = (0.5, 0.8, 1.0, 1.5, 3.0)
DEADLINE_S = 4.0
WARM_UP_S = 5.0


class Watch:
    """Resident memory and queue of the mesh, from outside."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self._pids = {s["name"]: s["pid"] for s in facts["services"]}
        self._metrics = next(s["metrics"] for s in facts["services"] if s["name"] == "scheduler-0")
        self.queued: list[float] = []

    def rss_mib(self) -> dict[str, float]:
        """Of gateway and scheduler."""
        found = {}
        for name in ("gateway", "scheduler-0"):
            pages = int(Path(f"/proc/{self._pids[name]}/statm").read_text().split()[1])
            found[name] = round(pages * 4096 / 2**20, 1)
        return found

    async def run(self) -> None:
        """Samples the queue until cancelled."""
        while True:
            await asyncio.sleep(0.5)
            self.queued.append(await asyncio.to_thread(self._queue))

    def _queue(self) -> float:
        with urllib.request.urlopen(f"http://{self._metrics}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        line = next(one for one in lines if one.startswith("infermesh_num_tokens_queued "))
        return float(line.split()[1])


def outcome(answer: Timeline) -> str:
    """Good: complete within its deadline. Who is refused early has time to go elsewhere."""
    if answer.error is None:
        return "good" if answer.e2e_s <= DEADLINE_S else "late"
    return answer.error if answer.e2e_s < DEADLINE_S / 2 else f"late {answer.error}"


async def measure(facts: dict[str, Any], seconds: float, levels: tuple[float, ...]) -> Any:
    """Capacity, then each level."""
    headers = {"x-request-timeout-s": str(DEADLINE_S)}
    async with Client(Target.of_mesh(facts), WORKLOAD, headers) as client:
        prompts = WORKLOAD.endless()
        await closed_loop(client.ask, lasting(3, prompts), 8)
        done = await closed_loop(client.ask, lasting(seconds / 2, prompts), 32)
        capacity = sum(outcome(one) == "good" for one in done) / (seconds / 2)
        watch = Watch(facts)
        rows = [
            await one_level(watch, client, prompts, level, level * capacity, seconds)
            for level in levels
        ]
    peak = max(row["goodput_per_s"] for row in rows)
    return {
        "capacity_per_s": round(capacity, 1),
        "deadline_s": DEADLINE_S,
        "levels": rows,
        "last_over_peak": round(rows[-1]["goodput_per_s"] / peak, 3),
        "within_bar": rows[-1]["goodput_per_s"] >= 0.9 * peak,
    }


async def one_level(
    watch: Watch,
    client: Client,
    prompts: Iterator[Prompt],
    level: float,
    per_second: float,
    seconds: float,
) -> dict[str, Any]:
    """Open-loop load at a multiple of the capacity; the first seconds only warm up."""
    before = watch.rss_mib()
    watch.queued.clear()
    began = time.perf_counter() + WARM_UP_S
    taken = lasting(WARM_UP_S + seconds, prompts)
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(watch.run())
        done = await open_loop(client.ask, taken, per_second, random.Random(level))
        watching.cancel()
    counted = [one for one in done if began <= one.ended_s < began + seconds]
    outcomes = Counter(outcome(one) for one in counted)
    answered_s = [one.e2e_s for one in counted if one.error is None]
    return {
        "level": level,
        "offered_per_s": round(len(counted) / seconds, 1),
        "goodput_per_s": round(outcomes["good"] / seconds, 1),
        "latency_p50_ms": percentile_ms(answered_s, 50),
        "latency_p99_ms": percentile_ms(answered_s, 99),
        "outcomes": dict(outcomes),
        "queue_tokens_mean": round(sum(watch.queued) / max(1, len(watch.queued))),
        "queue_tokens_max": round(max(watch.queued, default=0)),
        "rss_mib_before": before,
        "rss_mib_after": watch.rss_mib(),
    }


def main() -> None:
    """Measures, prints, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    slots = ("--set", f"scheduler.max_num_seqs={flags.max_num_seqs}")
    with simulated_mesh(PROFILE, *slots) as facts:
        measured = asyncio.run(measure(facts, flags.seconds, tuple(flags.levels)))
    result = {"machine": describe(), "profile_us": PROFILE, **measured}
    print(json.dumps(result, indent=2))
    keep(result, flags.json)


if __name__ == "__main__":
    main()
