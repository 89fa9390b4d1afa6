"""How much of the memory's bandwidth decoding uses at one stream, through the whole mesh.

A token needs every weight once. So the bytes of the weights ÷ the time per output token are set
beside a plain read of as many bytes by as many threads, by turns on one machine.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.load import run_load
from benchmarks.machine import describe, keep
from benchmarks.paired import paired_ratio
from benchmarks.peers.infermesh import mesh_facts, served_model, target_of
from benchmarks.peers.model import SHAPE, TEXT_IDS
from benchmarks.peers.peer import PRECISIONS
from benchmarks.workload import Workload

READS = 5


def measure(facts: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Pairs of both rates; GB are 10**9 bytes."""
    served = served_model(facts)
    num_bytes = int(served["weight_bytes"])
    content = torch.ones(num_bytes // 8, dtype=torch.int64)
    pairs = []
    for number in range(1 + rounds):  # the first warms up
        workload = Workload(vocab=TEXT_IDS, temperature=0.0, seed=number)
        report = run_load(target_of(facts), workload, streams=1, requests=1)
        assert report.tpot_p50_ms is not None
        pairs.append((num_bytes / report.tpot_p50_ms / 1e6, num_bytes / _read_s(content) / 1e9))
    ratio = paired_ratio(pairs[1:])
    return {
        **served,
        "decoding_gb_per_s": round(statistics.median(one for one, _ in pairs[1:]), 2),
        "plain_read_gb_per_s": round(statistics.median(one for _, one in pairs[1:]), 2),
        "ratio": dataclasses.asdict(ratio),
    }


def _read_s(content: torch.Tensor) -> float:
    """Of one read of all of it, the median of some."""
    times = []
    for _ in range(READS):
        began = time.perf_counter()
        content.sum().item()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    """Measures, prints, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    with mesh_facts(flags.precision) as facts:
        measured = measure(facts, flags.rounds)
    result = {
        "machine": describe(),
        "shape": SHAPE,
        "precision": flags.precision,
        "rounds": flags.rounds,
        "threads": torch.get_num_threads(),
        **measured,
    }
    print(json.dumps(result, indent=2))
    keep(result, flags.json)


if __name__ == "__main__":
    main()
