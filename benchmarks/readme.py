"""Reproduces every figure of the README and writes benchmarks/results/*.json."""

import subprocess
import sys

from benchmarks.local_mesh import ROOT

RUNS = (
    ("benchmarks.throughput", "--shape", "demo", "--json", "benchmarks/results/demo.json"),
    (
        "benchmarks.throughput", "--shape", "qwen2.5-0.5b", "--beside-transformers",
        "--json", "benchmarks/results/qwen2.5-0.5b.json",
    ),
    ("benchmarks.start_up", "--json", "benchmarks/results/start_up.json"),
    ("benchmarks.plan_cost", "--json", "benchmarks/results/plan_cost.json"),
    (
        "benchmarks.cache_miss_cost", "--rounds", "500",
        "--json", "benchmarks/results/cache_miss_cost.json",
    ),
    (
        "benchmarks.cache_miss_cost", "--set", "cache.words_first=false",
        "--json", "benchmarks/results/cache_miss_cost_embedded.json",
    ),
    ("benchmarks.cache_lookup", "--json", "benchmarks/results/cache_lookup.json"),
)  # fmt: skip


def main() -> None:
    """Runs one after another; the first failure ends it."""
    for module, *arguments in RUNS:
        print(f"== python -m {module} {' '.join(arguments)}", flush=True)
        subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
