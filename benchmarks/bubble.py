"""How long the shard is idle while requests are open: 32 streams on the demo model, over HTTP.

A bubble is the time in which the shard had no step although the result of the one before had left
something to do; the scheduler counts it. Bar: at most 3 % of the time that steps take. Beside it
stands what gateway and scheduler compute per token, by the system's count of their processor time.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.load import Target, run_load
from benchmarks.local_mesh import local_mesh, samples, simulated_mesh
from benchmarks.machine import describe, keep
from benchmarks.workload import Workload

BAR = 0.03
COUNTED = ("shard_busy_seconds_total", "shard_bubble_seconds_total", "steps_total")
# Steps take next to no time: what is left is the mesh's own work.
FASTEST = {"fixed_us": 100, "per_prefill_token_us": 0, "per_decode_row_us": 0}


def measure(facts: dict[str, Any], streams: int, output_tokens: int) -> dict[str, float]:
    """One run of two requests per stream."""
    addresses = {one["name"]: one["metrics"] for one in facts["services"]}
    addresses["gateway"] = facts["admin_url"].removeprefix("http://")
    before = {name: samples(address) for name, address in addresses.items() if address}
    workload = Workload(output_tokens=output_tokens, vocab=(300, 1900), seed=streams)
    report = run_load(Target.of_mesh(facts), workload, streams, 2 * streams)
    after = {name: samples(address) for name, address in addresses.items() if address}

    def grown(service: str, name: str) -> float:
        return after[service][name] - before[service][name]

    busy_s, bubble_s, steps = (grown("scheduler-0", name) for name in COUNTED)
    cpu_ms = {
        f"{name.partition('-')[0]}_cpu_ms_per_token": round(
            1e3 * grown(name, "process_cpu_seconds_total") / report.output_tokens, 4
        )
        for name in ("gateway", "scheduler-0", "shard-0")
    }
    return {
        "streams": streams,
        "tokens_per_s": report.tokens_per_s,
        "steps": steps,
        "step_ms": round(1e3 * busy_s / steps, 3),
        "bubble": round(bubble_s / busy_s, 4),
        **cpu_ms,
    }


def repeat(facts: dict[str, Any], streams: int, tokens: int, rounds: int) -> list[dict[str, float]]:
    """That many runs on one mesh, after one that warms it up."""
    measure(facts, streams, 16)
    return [measure(facts, streams, tokens) for _ in range(rounds)]


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of every figure."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    """Measures, prints, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    result: dict[str, Any] = {"machine": describe(), "bar": BAR}
    load = (flags.streams, flags.tokens, flags.rounds)
    with local_mesh("--no-cache") as facts:
        result["demo"] = medians(repeat(facts, *load))
    with simulated_mesh(FASTEST) as facts:
        result["simulated"] = medians(repeat(facts, *load))
    for name in ("demo", "simulated"):
        print(name, result[name])
    result["met"] = result["demo"]["bubble"] <= BAR
    print(f"bar: bubble <= {BAR} of the time of steps on the demo model: {result['met']}")
    keep(result, flags.json)


if __name__ == "__main__":
    main()
