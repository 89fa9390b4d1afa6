"""From `infermesh up` to the first token, beside the slowest service started alone.

Each is timed from its start to its end of work: the mesh to its first streamed token, the shard
alone to having loaded the demo model. Alternating; the bar is a ratio of at most 1.5.
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

from benchmarks.load import Target, run_load
from benchmarks.local_mesh import ROOT, local_mesh
from benchmarks.machine import describe, keep
from benchmarks.paired import paired_ratio
from benchmarks.workload import Workload
from infermesh import rpc
from infermesh.v1 import shard_service_pb2 as pb
from infermesh.v1 import shard_service_pb2_grpc as pb_grpc

DEMO_MODEL = ROOT / "demo" / "model"


def mesh_to_first_token_s() -> float:
    """One `infermesh up` until it has streamed its first token."""
    began = time.perf_counter()
    with local_mesh() as facts:
        workload = Workload(prompt_tokens=16, output_tokens=1)
        run_load(Target.of_mesh(facts), workload, streams=1, requests=1)
        return time.perf_counter() - began


def shard_alone_s() -> float:
    """One shard process until it has loaded the demo model."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{folder}/s.sock"
        began = time.perf_counter()
        command = [sys.executable, "-m", "services.shard", f"--shard.address={address}"]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            asyncio.run(_load(address))
            return time.perf_counter() - began
        finally:
            process.terminate()
            process.wait(60)


async def _load(address: str) -> None:
    request = pb.LoadRequest(
        model=str(DEMO_MODEL),
        dtype="auto",
        load_format="safetensors",
        block_size=16,
        max_num_seqs=64,
        max_batch_tokens=512,
    )
    async with rpc.channel(address) as channel:
        call = pb_grpc.ShardServiceStub(channel).Load(request, wait_for_ready=True, timeout=120)
        async for _ in call:
            pass


def main() -> None:
    """Alternates the two and prints their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    shard_alone_s()  # warm the page cache for both
    pairs = [(mesh_to_first_token_s(), shard_alone_s()) for _ in range(flags.repetitions)]
    ratio = paired_ratio(pairs)
    result = {
        "machine": describe(),
        "mesh_to_first_token_s": round(statistics.median(mesh for mesh, _ in pairs), 2),
        "shard_alone_s": round(statistics.median(alone for _, alone in pairs), 2),
        "ratio": dataclasses.asdict(ratio),
        "at_most_1.5": ratio.verdict(1.5),
        "pairs": [(round(mesh, 2), round(alone, 2)) for mesh, alone in pairs],
    }
    print(json.dumps(result, indent=2))
    keep(result, flags.json)


if __name__ == "__main__":
    main()
