"""Output tokens/s and latency of a whole mesh at several numbers of streams, over HTTP.

Beside other servers and libraries it is `benchmarks.compare` that measures it.
"""

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.load import Target, run_load
from benchmarks.local_mesh import ROOT, local_mesh
from benchmarks.machine import describe, keep
from benchmarks.peers.infermesh import served_model
from benchmarks.shapes import SHAPES, VOCAB, make_shape
from benchmarks.workload import Workload


def measure(shape: str, streams: list[int], rounds: int, waves: int) -> dict[str, Any]:
    """A mesh per round; medians of its rates per number of streams."""
    served: dict[str, Any] = {}
    rates: dict[int, list[float]] = {count: [] for count in streams}
    reports: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        demo = shape == "demo"
        model_dir = ROOT / "demo" / "model" if demo else make_shape(shape, Path(folder))
        flags = [] if demo else ["--model", str(model_dir), "--load-format", "dummy"]
        vocab = (300, 1900) if demo else (300, VOCAB - 100)
        for number in range(rounds):
            with local_mesh(*flags) as facts:
                served = served_model(facts)
                target = Target.of_mesh(facts)
                for count in streams:
                    workload = Workload(vocab=vocab, seed=1000 * number + count)
                    report = run_load(target, workload, count, requests=count * waves)
                    reports.append({"streams": count, **dataclasses.asdict(report)})
                    rates[count].append(report.tokens_per_s)
    return {
        "machine": describe(),
        "shape": shape,
        **served,
        "tokens_per_s": {count: statistics.median(found) for count, found in rates.items()},
        "runs": reports,
    }


def main() -> None:
    """Parses the flags, measures, prints a table, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=("demo", *SHAPES), default="demo")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--waves", type=int, default=2, help="requests per stream and round")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    result = measure(flags.shape, flags.streams, flags.rounds, flags.waves)
    print(f"{'streams':>8} {'tokens/s':>9}")
    for count, rate in result["tokens_per_s"].items():
        print(f"{count:>8} {rate:>9.1f}")
    keep(result, flags.json)


if __name__ == "__main__":
    main()
