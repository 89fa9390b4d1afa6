"""What a step costs beside its arithmetic: one stream through 24 layers that are next to nothing.

With the kernels, where a layer is one call, and with transformers' modules, by turns in one
process. Bar: none; the smaller the better, as every step of every model pays it.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, keep
from benchmarks.paired import paired_ratio
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
from tests.tiny_models import write_tiny_model

LAYERS = 24
PROMPT = 8
SETTINGS = ("auto", "off")  # of shard.kernels


class Decoder:
    """One sequence that decodes."""

    def __init__(self, directory: Path, kernels: str) -> None:
        spec = LoadSpec(
            str(directory), block_size=512, num_blocks=1, max_num_seqs=1, max_batch_tokens=16
        )
        config = ShardConfig(device="cpu", num_threads=1, kernels=kernels)
        self._runner = StepRunner(load_model(spec, config, lambda progress: None))
        self._num_steps = 0
        new = NewSequence(Slot(0), [BlockId(0)], 0, PROMPT, 0, Sampling(temperature=0.0))
        row = Row(Slot(0), PROMPT, RowSource.LITERAL, list(range(4, 4 + PROMPT)), sample=True)
        self._run([new], row)

    def step_s(self) -> float:
        """Seconds of one step."""
        return self._run([], Row(Slot(0), 1, RowSource.LAST, sample=True))

    def _run(self, new: list[NewSequence], row: Row) -> float:
        self._num_steps += 1
        step = Step(Epoch(1), StepId(self._num_steps), new_sequences=new, rows=[row])
        began = time.perf_counter()
        self._runner.execute(step, 0.0)
        return time.perf_counter() - began


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """Medians of the rounds' medians, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        directory = write_tiny_model(Path(folder), "qwen2", num_hidden_layers=LAYERS)
        decoders = {kernels: Decoder(directory, kernels) for kernels in SETTINGS}
    pairs = []
    for _ in range(rounds):
        times = {
            kernels: statistics.median(one.step_s() for _ in range(steps))
            for kernels, one in decoders.items()
        }
        pairs.append((times["auto"], times["off"]))
    ratio = paired_ratio(pairs)
    medians = [round(1e3 * statistics.median(column), 2) for column in zip(*pairs, strict=True)]
    return {
        "kernels_ms": medians[0],
        "transformers_ms": medians[1],
        "ratio": ratio.median,
        "ratio_95": [ratio.low, ratio.high],
    }


def main() -> None:
    """Measures, prints, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30, help="per round and contestant")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    result = {"machine": describe(), **measure(flags.rounds, flags.steps)}
    print(json.dumps(result, indent=2))
    keep(result, flags.json)


if __name__ == "__main__":
    host.prepare_process()
    main()
