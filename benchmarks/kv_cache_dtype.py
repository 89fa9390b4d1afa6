"""What a KV cache of bfloat16 saves: whole steps of decoding over long contexts, and memory.

Two engines of one process with the same random bfloat16 weights, K and V of one in float32 and of
the other in bfloat16, take turns with equal steps. Contexts are noise that nobody computed. Bar:
none for time; a token's K and V take half the bytes.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, keep
from benchmarks.paired import paired_ratio
from benchmarks.shapes import make_shape
from infermesh.config import ShardConfig
from services.shard import host
from services.shard.domain import (
    BlockId,
    Epoch,
    LoadSpec,
    NewSequence,
    Row,
    RowSource,
    Sampling,
    Slot,
    Step,
    StepId,
)
from services.shard.loading import load_model
from services.shard.stepping import StepRunner

BLOCK = 16
DTYPES = ("float32", "bfloat16")


class Decoder:
    """Sequences that decode, so many at a time."""

    def __init__(self, directory: Path, dtype: str, max_rows: int, max_context: int) -> None:
        self._blocks_per_row = -(-(max_context + 1024) // BLOCK)
        spec = LoadSpec(
            str(directory),
            load_format="dummy",
            block_size=BLOCK,
            num_blocks=max_rows * self._blocks_per_row,
            max_num_seqs=max_rows,
            kv_cache_dtype=dtype,
        )
        loaded: Any = load_model(spec, ShardConfig(device="cpu"), lambda progress: None)
        for states in (*loaded.engine._pool.keys, *loaded.engine._pool.values):
            states.normal_()
        capacity = loaded.capacity
        self.bytes_per_token = capacity.kv_cache_bytes // (capacity.num_blocks * BLOCK)
        self._num_blocks = capacity.num_blocks
        self._runner = StepRunner(loaded)
        self._num_steps = 0

    def begin(self, rows: int, context: int) -> None:
        """Takes so many sequences of that length, and computes a token of each."""
        self._runner.reset()
        blocks = random.Random(0).sample(range(self._num_blocks), self._num_blocks)
        new = [
            NewSequence(
                Slot(slot),
                [BlockId(blocks.pop()) for _ in range(self._blocks_per_row)],
                context - 1,
                context,
                0,
                Sampling(temperature=0.0),
            )
            for slot in range(rows)
        ]
        self._rows = [Row(Slot(slot), 1, RowSource.LAST, sample=True) for slot in range(rows)]
        self._run(new, [Row(Slot(i), 1, RowSource.LITERAL, [7], sample=True) for i in range(rows)])

    def step_s(self) -> float:
        """Seconds of one step."""
        return self._run([], self._rows)

    def _run(self, new: list[NewSequence], rows: list[Row]) -> float:
        self._num_steps += 1
        step = Step(Epoch(1), StepId(self._num_steps), new_sequences=new, rows=rows)
        began = time.perf_counter()
        self._runner.execute(step, 0.0)
        return time.perf_counter() - began


def measure(decoders: dict[str, Decoder], rounds: int, steps: int) -> dict[str, Any]:
    """Medians of the rounds' medians, and how often bfloat16's go into float32's."""
    pairs = []
    for number in range(rounds):
        order = DTYPES if number % 2 else DTYPES[::-1]
        times = {
            name: statistics.median(decoders[name].step_s() for _ in range(steps)) for name in order
        }
        pairs.append((times["float32"], times["bfloat16"]))
    ratio = paired_ratio(pairs)
    medians = [round(1e3 * statistics.median(column), 2) for column in zip(*pairs, strict=True)]
    return {
        **{f"{name}_ms": median for name, median in zip(DTYPES, medians, strict=True)},
        "ratio": ratio.median,
        "ratio_95": [ratio.low, ratio.high],
    }


def main() -> None:
    """Measures, prints, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--contexts", nargs="+", type=int, default=[200, 2000])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="per round and contestant")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = make_shape(flags.shape, Path(folder))
        largest = max(flags.rows), max(flags.contexts)
        decoders = {name: Decoder(directory, name, *largest) for name in DTYPES}
    result: dict[str, Any] = {
        "machine": describe(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "shape": flags.shape,
        "bytes_per_token": {name: one.bytes_per_token for name, one in decoders.items()},
    }
    print(json.dumps(result, indent=2), flush=True)
    for context in flags.contexts:
        for rows in flags.rows:
            for one in decoders.values():
                one.begin(rows, context)
            name = f"{rows} rows of {context}"
            result[name] = measure(decoders, flags.rounds, flags.steps)
            print(name, json.dumps(result[name]), flush=True)
    keep(result, flags.json)


if __name__ == "__main__":
    host.prepare_process()
    main()
