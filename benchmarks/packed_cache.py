"""What packed weights on disk save: seconds of a load, and memory of a second replica.

A checkpoint of random bfloat16 weights is loaded by processes of its own, torch being imported
already: without packed weights on disk, leaving them there, and mapping them. Alternating; then two
processes hold the model at a time, and the kernel says what they take (PSS, Linux counts a shared
page once).
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.machine import ROOT, describe, keep
from benchmarks.paired import paired_ratio
from benchmarks.shapes import SHAPES, make_shape
from infermesh.config import ShardConfig

SCHEMES = ("", "int8", "int4")
CONTEXT = 64
STEPS = 40


def make_checkpoint(shape: str, folder: Path) -> Path:
    """A directory with random weights in bfloat16."""
    from services.shard.model_files import read_model_files
    from services.shard.skeleton import meta_model, tied_parameters

    model = make_shape(shape, folder)
    skeleton = meta_model(read_model_files(model), torch.bfloat16)
    tied = tied_parameters(skeleton)
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(value.shape, dtype=torch.bfloat16)
        if value.dim() < 2
        else torch.empty(value.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=draw)
        for name, value in skeleton.state_dict().items()
        if name not in tied
    }
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def hold(model: Path, scheme: str, folder: Path, gib: float) -> None:
    """A process with a model: prints what it took to load, and lives until its input ends."""
    from services.shard import host

    host.prepare_process()
    import services.shard.torch_loading  # noqa: F401 - what every load imports
    from benchmarks.quantization import row
    from services.shard.domain import LoadSpec
    from services.shard.loading import load_model

    spec = LoadSpec(str(model), quantize=scheme, num_blocks=64)
    config = ShardConfig(device="cpu", packed_cache_gib=gib, packed_cache_dir=str(folder))
    start_s = time.perf_counter()
    loaded = load_model(spec, config, lambda progress: None)
    load_s = time.perf_counter() - start_s
    host.release_freed_memory()
    table = torch.arange(CONTEXT // spec.block_size + 4)[None].numpy()
    loaded.engine.compute([row(0, 0, list(range(300, 300 + CONTEXT)))], table)
    took_s = []
    for step in range(STEPS):
        start_s = time.perf_counter()
        loaded.engine.compute([row(0, CONTEXT + step, [300 + step])], table)
        took_s.append(time.perf_counter() - start_s)
    print(json.dumps({"load_s": load_s, "step_ms": 1e3 * statistics.median(took_s)}), flush=True)
    sys.stdin.read()


@contextmanager
def holder(model: Path, scheme: str, folder: Path, gib: float) -> Iterator[dict[str, Any]]:
    """Such a process, and what it printed."""
    command = [sys.executable, "-m", "benchmarks.packed_cache", "--hold", str(model)]
    command += ["--scheme", scheme, "--folder", str(folder), "--gib", str(gib)]
    # as services.shard sets it before it imports torch
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield {**json.loads(process.stdout.readline()), "pid": process.pid}
        finally:
            process.communicate()


def pss_mb(pids: list[int]) -> float:
    """Memory of processes together."""
    kib = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                kib += int(line.split()[1])
    return kib / 1024


def two_replicas_mb(model: Path, scheme: str, folder: Path, gib: float) -> float:
    """What two processes with one model take, of which the second starts when the first is up."""
    with ExitStack() as stack:
        both = [stack.enter_context(holder(model, scheme, folder, gib)) for _ in range(2)]
        return pss_mb([one["pid"] for one in both])


def measure(model: Path, scheme: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Loads of one scheme, in turn, and what two replicas take."""
    found: dict[str, list[dict[str, Any]]] = {"off": [], "leaving": [], "mapping": []}
    for turn in range(rounds):
        fresh = folder / f"{scheme}-{turn}"
        for kind, gib in (("off", 0.0), ("leaving", 64.0), ("mapping", 64.0)):
            with holder(model, scheme, fresh, gib) as facts:
                found[kind].append(facts)
        for entry in fresh.iterdir():
            entry.unlink()
        os.sync()  # what is being written back must not slow the next turn
    result: dict[str, Any] = {"scheme": scheme or "bfloat16"}
    for kind, runs in found.items():
        for name in ("load_s", "step_ms"):
            result[f"{kind}_{name}"] = round(statistics.median(run[name] for run in runs), 3)
    for kind in ("leaving", "mapping"):
        pairs = [
            (one["load_s"], off["load_s"])
            for one, off in zip(found[kind], found["off"], strict=True)
        ]
        result[f"{kind}_to_off"] = dataclasses.asdict(paired_ratio(pairs))
    for kind, gib in (("off", 0.0), ("mapping", 64.0)):
        result[f"two_replicas_mb_{kind}"] = round(
            two_replicas_mb(model, scheme, folder / f"{scheme}-two", gib)
        )
    return result


def main() -> None:
    """Prints one result per scheme."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--hold", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--scheme", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--gib", type=float, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.hold is not None:
        hold(flags.hold, flags.scheme, flags.folder, flags.gib)
        return
    with tempfile.TemporaryDirectory() as name:
        model = make_checkpoint(flags.shape, Path(name))
        results = []
        for scheme in flags.schemes:
            results.append(measure(model, scheme, flags.rounds, Path(name) / "packed"))
            print(json.dumps(results[-1], indent=2), flush=True)
    keep({"machine": describe(), "shape": flags.shape, "results": results}, flags.json)


if __name__ == "__main__":
    main()
