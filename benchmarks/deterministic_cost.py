"""What deterministic mode costs: output tokens/s with it beside the same mesh without it.

Two meshes with one model that take turns, at several numbers of streams; both serve float32, and
both stay up, so that a round differs in the mode alone.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.load import Target, run_load
from benchmarks.local_mesh import local_mesh
from benchmarks.machine import describe, keep
from benchmarks.paired import paired_ratio
from benchmarks.workload import Workload

FLAGS = ("--no-cache", "--dtype", "float32")


def tokens_per_s(facts: dict[str, Any], workload: Workload, streams: int) -> float:
    """One request per stream."""
    return run_load(Target.of_mesh(facts), workload, streams, requests=streams).tokens_per_s


def measure(streams: list[int], rounds: int, flags: list[str]) -> dict[str, Any]:
    """Alternates the two meshes; the ratio of their rates at each number of streams."""
    pairs: dict[int, list[tuple[float, float]]] = {count: [] for count in streams}
    with local_mesh(*FLAGS, *flags, "--deterministic") as on, local_mesh(*FLAGS, *flags) as off:
        for number in range(rounds + 1):  # the first warms up
            for count in streams:
                workload = Workload(seed=1000 * number + count)
                order = (on, off) if number % 2 else (off, on)
                rates = {id(facts): tokens_per_s(facts, workload, count) for facts in order}
                if number:
                    pairs[count].append((rates[id(on)], rates[id(off)]))
    rows = {}
    for count, measured in pairs.items():
        ratio = paired_ratio(measured)
        rows[str(count)] = {
            "deterministic_tokens_per_s": round(statistics.median(on for on, _ in measured), 1),
            "plain_tokens_per_s": round(statistics.median(off for _, off in measured), 1),
            "ratio": ratio.median,
            "ratio_95": [ratio.low, ratio.high],
        }
    return {"machine": describe(), "rounds": rounds, "streams": rows}


def main() -> None:
    """Parses the flags, measures, prints, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], help="as infermesh up takes it")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    settings = [word for item in flags.set for word in ("--set", item)]
    result = measure(flags.streams, flags.rounds, settings)
    print(json.dumps(result, indent=2))
    keep(result, flags.json)


if __name__ == "__main__":
    main()
