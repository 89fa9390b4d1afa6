"""Output tokens/s and latency of a whole mesh at several numbers of streams, over HTTP.

With --beside-transformers, each round also runs `transformers.generate` on the same weights and
prompts as one static batch, in the same float type, in a process of its own, alternating; the table
then has the ratios.
"""

import argparse
import asyncio
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc

from benchmarks.load import Report, Workload, run_load
from benchmarks.local_mesh import ROOT, local_mesh
from benchmarks.machine import describe
from benchmarks.shapes import SHAPES, VOCAB, make_shape
from infermesh.v1 import inference_service_pb2 as pb
from infermesh.v1.inference_service_pb2_grpc import InferenceServiceStub


def measure_mesh(facts: dict[str, Any], workload: Workload, streams: int, waves: int) -> Report:
    """One run of `waves` requests per stream."""
    target, count = (facts["url"], facts["models"][0]), streams * waves
    return asyncio.run(run_load(*target, workload, streams, count, facts["api_key"]))


def generate_once(model_dir: str, dtype: str, workload: Workload, streams: int) -> float:
    """Output tokens/s of `transformers.generate` in this process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir)
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    prompts = torch.tensor(workload.prompts(streams))
    options = {
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "attention_mask": torch.ones_like(prompts),
    }
    with torch.inference_mode():
        model.generate(prompts[:1], max_new_tokens=2, **options)
        began = time.perf_counter()
        model.generate(prompts, max_new_tokens=workload.output_tokens, **options)
        return streams * workload.output_tokens / (time.perf_counter() - began)


def _generate_in_process(model_dir: Path, dtype: str, workload: Workload, streams: int) -> float:
    command = [
        sys.executable, "-m", "benchmarks.throughput", "--generate", str(model_dir),
        dtype, json.dumps(dataclasses.asdict(workload)), str(streams),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def compare(shape: str, streams: list[int], rounds: int, waves: int, peer: bool) -> dict[str, Any]:
    """Alternates mesh and peer; medians per number of streams."""
    dtype = ""
    rows: dict[int, dict[str, list[float]]] = {}
    reports: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        demo = shape == "demo"
        model_dir = ROOT / "demo" / "model" if demo else make_shape(shape, Path(folder))
        flags = [] if demo else ["--model", str(model_dir), "--load-format", "dummy"]
        for number in range(rounds):
            with local_mesh(*flags) as facts:
                dtype = served_dtype(facts)
                for count in streams:
                    vocab = (300, 1900) if demo else (300, VOCAB - 100)
                    workload = Workload(vocab=vocab, seed=1000 * number + count)
                    report = measure_mesh(facts, workload, count, waves)
                    reports.append(dataclasses.asdict(report))
                    row = rows.setdefault(count, {"mesh": [], "transformers": []})
                    row["mesh"].append(report.tokens_per_s)
            for count in streams if peer else ():
                workload = Workload(vocab=(300, VOCAB - 100), seed=1000 * number + count)
                rate = _generate_in_process(model_dir, dtype, workload, count)
                rows[count]["transformers"].append(round(rate, 1))
    return {
        "machine": describe(),
        "shape": shape,
        "dtype": dtype,
        "rows": rows,
        "runs": reports,
    }


def served_dtype(facts: dict[str, Any]) -> str:
    """The float type of the mesh's first model."""
    with grpc.insecure_channel(facts["grpc"]) as channel:
        request = pb.GetModelRequest(model=facts["models"][0])
        metadata = (("authorization", f"Bearer {facts['api_key']}"),)
        return str(InferenceServiceStub(channel).GetModel(request, metadata=metadata).model.dtype)


def print_rows(rows: dict[int, dict[str, list[float]]]) -> None:
    """One line per number of streams."""
    print(f"{'streams':>8} {'mesh tok/s':>12} {'transformers':>13} {'ratio':>6}")
    for count, row in rows.items():
        mesh = statistics.median(row["mesh"])
        peer = statistics.median(row["transformers"]) if row["transformers"] else None
        rest = f"{peer:>13.1f} {mesh / peer:>6.2f}" if peer else ""
        print(f"{count:>8} {mesh:>12.1f} {rest}")


def main() -> None:
    """Parses the flags, measures, prints a table, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=("demo", *SHAPES), default="demo")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--waves", type=int, default=2, help="requests per stream and round")
    parser.add_argument("--beside-transformers", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--generate", nargs=4, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.generate:
        model_dir, dtype, workload, streams = flags.generate
        fields = json.loads(workload)
        fields["vocab"] = tuple(fields["vocab"])
        print(generate_once(model_dir, dtype, Workload(**fields), int(streams)))
        return
    result = compare(
        flags.shape, flags.streams, flags.rounds, flags.waves, flags.beside_transformers
    )
    print_rows(result["rows"])
    if flags.json:
        flags.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
