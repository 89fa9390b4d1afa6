"""Reproduces every figure of the README and writes benchmarks/results/*.json.

What stands beside peers is measured with --peers: it sets them up, which downloads and builds.
"""

import argparse
import subprocess
import sys

from benchmarks.local_mesh import ROOT

RUNS = (
    ("benchmarks.throughput", "--shape", "demo", "--json", "benchmarks/results/demo.json"),
    ("benchmarks.mesh_tax", "--json", "benchmarks/results/mesh_tax.json"),
    ("benchmarks.shared_prefix_ttft", "--json", "benchmarks/results/shared_prefix_ttft.json"),
    ("benchmarks.bandwidth", "--json", "benchmarks/results/bandwidth.json"),
    ("benchmarks.start_up", "--json", "benchmarks/results/start_up.json"),
    ("benchmarks.plan_cost", "--json", "benchmarks/results/plan_cost.json"),
    ("benchmarks.step_overhead", "--json", "benchmarks/results/step_overhead.json"),
    (
        "benchmarks.sampling_cost", "--before", "7468b48",
        "--json", "benchmarks/results/sampling_cost.json",
    ),
    (
        "benchmarks.product_kernels", "--threads", "1",
        "--json", "benchmarks/results/product_kernels.json",
    ),
    (
        "benchmarks.attention_kernels", "--threads", "1",
        "--json", "benchmarks/results/attention_kernels.json",
    ),
    ("benchmarks.kv_cache_dtype", "--json", "benchmarks/results/kv_cache_dtype.json"),
    ("benchmarks.bubble", "--json", "benchmarks/results/bubble.json"),
    (
        "benchmarks.cache_miss_cost", "--rounds", "500",
        "--json", "benchmarks/results/cache_miss_cost.json",
    ),
    (
        "benchmarks.cache_miss_cost", "--set", "cache.words_first=false",
        "--json", "benchmarks/results/cache_miss_cost_embedded.json",
    ),
    (
        "benchmarks.prefix_reuse", "--pressure", "2",
        "--json", "benchmarks/results/prefix_reuse.json",
    ),
    ("benchmarks.prefix_routing", "--json", "benchmarks/results/prefix_routing.json"),
    (
        "benchmarks.quantization", "--shapes", "demo", "qwen2.5-0.5b",
        "--json", "benchmarks/results/quantization.json",
    ),
    ("benchmarks.cache_lookup", "--json", "benchmarks/results/cache_lookup.json"),
    ("benchmarks.chunked_prefill", "--json", "benchmarks/results/chunked_prefill.json"),
    ("benchmarks.fairness", "--json", "benchmarks/results/fairness.json"),
    ("benchmarks.goodput", "--json", "benchmarks/results/goodput.json"),
    ("benchmarks.failover_gap", "--json", "benchmarks/results/failover_gap.json"),
    ("benchmarks.deterministic_cost", "--json", "benchmarks/results/deterministic_cost.json"),
)  # fmt: skip


def beside_peers(precision: str) -> tuple[str, ...]:
    """One comparison, with its table and its plot."""
    result = f"benchmarks/results/peers_{precision}"
    kept = (("--json", "json"), ("--markdown", "md"), ("--svg", "svg"))
    written = [word for flag, suffix in kept for word in (flag, f"{result}.{suffix}")]
    return "benchmarks.compare", "--precision", precision, *written


def main() -> None:
    """Runs one after another; the first failure ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", action="store_true")
    flags = parser.parse_args()
    runs = [beside_peers(precision) for precision in ("bf16", "int8", "int4")]
    for module, *arguments in runs if flags.peers else RUNS:
        print(f"== python -m {module} {' '.join(arguments)}", flush=True)
        subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
