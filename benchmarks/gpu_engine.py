"""Parity and speed of the engine on one device, with nothing installed but what a shard needs.

    python benchmarks/gpu_engine.py --device cuda --out result.json
    python benchmarks/gpu_engine.py --device cpu --quick --out result.json

Parity: tiny random models of every architecture in float32, paged and chunked and batched, against
transformers on the same device. Speed: decode at several batch sizes and prefill, random bfloat16
weights in real shapes, through the same step runner that serves. Exit status 1 where parity fails.
"""

import argparse
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM

from benchmarks import machine
from benchmarks.shapes import SHAPES, make_shape
from infermesh.config import ShardConfig
from services.shard.domain import (
    BlockId,
    Epoch,
    LoadSpec,
    NewSequence,
    Row,
    RowSource,
    RowStatus,
    Sampling,
    Slot,
    Step,
    StepId,
)
from services.shard.engine import LoadedModel
from services.shard.loading import load_model
from services.shard.stepping import StepRunner
from tests.tiny_models import ARCHITECTURES, VOCAB_SIZE, write_tiny_model

# float32 logprobs through a few layers, two orders of summation
PARITY_TOLERANCE = 2e-3
BLOCK = 16


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    shapes: Sequence[str]
    batches: Sequence[int]
    context: int
    prefill: int
    repeats: int
    # Replaces fields of the shapes' configs.
    overrides: Mapping[str, Any]


FULL = Plan(tuple(SHAPES), (1, 8, 32, 128), context=512, prefill=2048, repeats=30, overrides={})
QUICK = Plan(
    ("qwen2.5-0.5b",),
    (1, 4),
    context=32,
    prefill=64,
    repeats=3,
    overrides={"num_hidden_layers": 2, "vocab_size": 8000},
)


def main() -> int:
    """Runs all parts and writes the JSON; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="small shapes: seconds on a CPU")
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    plan = QUICK if arguments.quick else FULL
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {"machine": machine.describe(), "quick": arguments.quick}
        result["parity"] = [parity(a, Path(folder), arguments.device) for a in ARCHITECTURES]
        result["speed"] = [speed(s, Path(folder), arguments.device, plan) for s in plan.shapes]
    if torch.cuda.is_available():
        result["machine"]["gpu"] = torch.cuda.get_device_name()
    result["seconds"] = round(time.perf_counter() - start_s, 1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    failed = [p["architecture"] for p in result["parity"] if not p["passed"]]
    say(f"wrote {arguments.out}" + (f"; PARITY FAILED: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def parity(architecture: str, folder: Path, device: str) -> dict[str, Any]:
    """Top logprobs and greedy tokens of mixed steps against transformers, in float32."""
    directory = write_tiny_model(folder / architecture, architecture)
    spec = LoadSpec(
        str(directory), block_size=4, num_blocks=200, max_num_seqs=8, max_batch_tokens=16
    )
    loaded = _load(spec, device)
    reference: Any = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    reference.to(loaded.device).eval()
    rng = random.Random(architecture)
    prompts = [[rng.randrange(4, VOCAB_SIZE) for _ in range(n)] for n in (70, 41, 9, 3, 1)]
    outputs = _chunked_greedy(StepRunner(loaded), prompts, num_tokens=20)
    worst, differing, ties = 0.0, 0, 0
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = prompt + [token for token, _, _ in output]
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens], device=loaded.device)).logits[0]
        wanted = torch.log_softmax(logits[len(prompt) - 1 : -1].double(), dim=-1).cpu()
        for line, (token, top_ids, top_logprobs) in zip(wanted, output, strict=True):
            gap = (line[list(top_ids)] - torch.tensor(top_logprobs)).abs().max()
            worst = max(worst, float(gap))
            if token != int(line.argmax()):
                tie = float(line.max() - line[token]) < 1e-4
                ties, differing = ties + tie, differing + (not tie)
    passed = worst < PARITY_TOLERANCE and differing == 0
    say(f"parity {architecture}: worst logprob gap {worst:.1e}, {'ok' if passed else 'FAILED'}")
    return {
        "architecture": architecture,
        "passed": passed,
        "worst_logprob_gap": worst,
        "tokens": sum(map(len, outputs)),
        "differing_tokens": differing,
        "ties": ties,
    }


def _chunked_greedy(
    runner: StepRunner, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[list[tuple[int, Sequence[int], Sequence[float]]]]:
    """Prompts in chunks of at most 5 tokens beside the decodes of others, on shuffled blocks."""
    blocks = random.Random(1).sample(range(200), 200)
    sampling = Sampling(temperature=0.0, top_logprobs=5)
    news = []
    for slot, prompt in enumerate(prompts):
        table = [BlockId(blocks.pop()) for _ in range(-(-(len(prompt) + num_tokens) // 4))]
        news.append(NewSequence(Slot(slot), table, 0, len(prompt), 0, sampling))
    done = [0] * len(prompts)
    outputs: list[list[tuple[int, Sequence[int], Sequence[float]]]] = [[] for _ in prompts]
    while any(len(output) < num_tokens for output in outputs):
        rows, budget = [], 16
        for slot, prompt in enumerate(prompts):
            if len(outputs[slot]) == num_tokens or budget == 0:
                continue
            if done[slot] < len(prompt):
                chunk = prompt[done[slot] : done[slot] + min(5, budget)]
                done[slot] += len(chunk)
                ends = done[slot] == len(prompt)
                rows.append(Row(Slot(slot), len(chunk), RowSource.LITERAL, chunk, sample=ends))
            else:
                rows.append(Row(Slot(slot), 1, RowSource.LAST, sample=True))
            budget -= rows[-1].num_tokens
        outcome = runner.execute(Step(Epoch(1), StepId(1), new_sequences=news, rows=rows), 0.0)
        news = []
        for row in outcome.rows:
            if row.token_id is not None and row.logprobs is not None:
                top = row.logprobs
                outputs[row.slot].append((row.token_id, top.top_token_ids, top.top_logprobs))
    return outputs


def speed(shape: str, folder: Path, device: str, plan: Plan) -> dict[str, Any]:
    """Decode and prefill of one shape with random bfloat16 weights."""
    batch = max(plan.batches)
    per_sequence = -(-plan.context // BLOCK) + 3
    directory = make_shape(shape, folder)
    config = directory / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **plan.overrides}))
    spec = LoadSpec(
        str(directory),
        dtype="bfloat16",
        load_format="dummy",
        block_size=BLOCK,
        max_num_seqs=batch + 1,
        max_batch_tokens=max(plan.prefill, batch),
        num_blocks=batch * per_sequence + -(-plan.prefill // BLOCK) + 3,
    )
    start_s = time.perf_counter()
    loaded = _load(spec, device)
    result: dict[str, Any] = {
        "shape": shape,
        "device": loaded.device,
        "dtype": loaded.manifest.dtype,
        "load_seconds": round(time.perf_counter() - start_s, 2),
        "num_parameters": loaded.manifest.num_parameters,
    }
    runner = StepRunner(loaded)
    result["decode"] = [
        _decode(runner, size, per_sequence, plan, loaded.manifest.weight_bytes)
        for size in plan.batches
    ]
    result["prefill"] = _prefill(runner, batch * per_sequence, plan)
    say(f"{shape}: {json.dumps(result['decode'])} {json.dumps(result['prefill'])}")
    del runner, loaded
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


def _decode(
    runner: StepRunner, batch: int, per_sequence: int, plan: Plan, weight_bytes: int
) -> dict[str, Any]:
    """One token of each of `batch` sequences per step, contexts from `context` on; greedy."""
    runner.reset()
    for slot in range(batch):
        _run_prompt(runner, Slot(slot), slot * per_sequence, plan.context, finish=False)
    slots = [Slot(slot) for slot in range(batch)]
    step = Step(Epoch(1), StepId(1), rows=[Row(s, 1, RowSource.LAST, sample=True) for s in slots])
    times = _times(lambda: _execute(runner, step), plan.repeats)
    median_s = statistics.median(times)
    return {
        "batch": batch,
        "context": plan.context,
        "step_ms": round(median_s * 1e3, 3),
        "tokens_per_s": round(batch / median_s, 1),
        "weight_gb_per_s": round(weight_bytes / median_s / 1e9, 1),
    }


def _prefill(runner: StepRunner, first_block: int, plan: Plan) -> dict[str, Any]:
    """One prompt in one step."""
    runner.reset()
    times = _times(
        lambda: _run_prompt(runner, Slot(0), first_block, plan.prefill, finish=True),
        max(3, plan.repeats // 6),
    )
    median_s = statistics.median(times)
    return {
        "tokens": plan.prefill,
        "step_ms": round(median_s * 1e3, 2),
        "tokens_per_s": round(plan.prefill / median_s, 1),
    }


def _run_prompt(
    runner: StepRunner, slot: Slot, first_block: int, num_tokens: int, *, finish: bool
) -> None:
    """Places a sequence and computes its whole prompt in one step."""
    table = [BlockId(first_block + i) for i in range(-(-num_tokens // BLOCK) + 3)]
    new = NewSequence(slot, table, 0, num_tokens, 0, Sampling(temperature=0.0))
    tokens = [5 + i % 1000 for i in range(num_tokens)]
    step = Step(
        Epoch(1),
        StepId(1),
        finished=[slot] if finish else [],
        new_sequences=[new],
        rows=[Row(slot, num_tokens, RowSource.LITERAL, tokens, sample=True)],
    )
    _execute(runner, step)


def _execute(runner: StepRunner, step: Step) -> None:
    """A row that was not run would look fast."""
    outcome = runner.execute(step, 0.0)
    bad = [row for row in outcome.rows if row.status is not RowStatus.OK]
    if bad:
        raise RuntimeError(f"row {bad[0].slot} is {bad[0].status}: {bad[0].error}")


def _times(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each run after two to warm up; a step ends with its tokens on the host."""
    times = []
    for _ in range(repeats + 2):
        start_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - start_s)
    return times[2:]


def _load(spec: LoadSpec, device: str) -> LoadedModel:
    return load_model(spec, ShardConfig(device=device), lambda progress: None)


def say(line: str) -> None:
    """For the person who waits."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
