"""What the scheduler's own work costs per step: `plan` alone, and all of it, on one core.

A batcher with every sequence decoding, its results made up; bars: plan ≤ 0.3 ms at 32 sequences,
≤ 1.5 ms at 256. A third line has a prompt of 8,192 tokens arriving chunk by chunk beside them.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from infermesh.v1 import sampling_pb2
from infermesh.v1 import shard_service_pb2 as pb
from services.scheduler import batcher as batcher_module
from services.scheduler.batcher import Batcher, BatcherSettings
from services.scheduler.intake import ModelFacts, Submission
from services.scheduler.ledger import AppliedStep, Capacity
from services.scheduler.sequence import Sampling
from services.scheduler.stats import Stats
from services.scheduler.steps import encode

MODEL = ModelFacts("model", "fingerprint", 32_768, 32_000, frozenset({2}))
BLOCK_SIZE = 16
BUDGET = 512


class NoSink:
    """Takes every token and keeps none."""

    def accepted(self, stream_id: int, queued_tokens: int) -> None: ...
    def refused(self, stream_id: int, error: Exception) -> None: ...
    def finished(self, sequence: object, end: object) -> None: ...
    def flush(self) -> None: ...

    def delta(self, sequence: object, start: int, tokens: Sequence[int], logprobs: object) -> bool:
        return True


class TimedPlan:
    """`plan`, and how long each call took."""

    def __init__(self) -> None:
        self._plan = batcher_module.plan
        self.seconds: list[float] = []

    def __call__(self, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = self._plan(*arguments)
        self.seconds.append(time.perf_counter() - began)
        return result


def submission(stream_id: int, prompt_len: int) -> Submission:
    """A prompt that shares no block with another."""
    return Submission(
        request_id=f"request-{stream_id}",
        stream_id=stream_id,
        prompt_token_ids=[stream_id % 32_000] * prompt_len,
        choices=[(0, [])],
        sampling=Sampling(sampling_pb2.SamplingParams(temperature=0), needs_history=False),
        max_tokens=8_192,
        min_tokens=0,
        stop_token_ids=frozenset(),
        ignore_eos=True,
        priority=2,
        tenant="tenant",
        tenant_weight=1.0,
        remaining_s=None,
        sharing_domain="tenant",
        traceparent="",
    )


def answer(step: AppliedStep) -> pb.StepResult:
    """A result in which every sampling row drew token 7."""
    result = pb.StepResult(step_id=step.step_id)
    for row in step.rows:
        token_ids = [7] if row.samples else []
        result.rows.add(slot=row.placement.slot, status=pb.ROW_STATUS_OK, token_ids=token_ids)
    return result


def measure(num_sequences: int, num_steps: int, long_prompts: bool) -> dict[str, Any]:
    """Medians over `num_steps` steps with `num_sequences` decoding in each."""
    capacity = Capacity(64_000, BLOCK_SIZE, num_sequences + 8, BUDGET)
    batcher = Batcher(BatcherSettings(), MODEL, capacity, Stats(), time.monotonic)
    batcher.open_epoch(capacity, contents_survive=False)
    for stream_id in range(num_sequences):
        batcher.submit(submission(stream_id, 128), NoSink())
    timed = TimedPlan()
    while len(batcher.roster.ledger.running) < num_sequences or _is_prefilling(batcher):
        _one_step(batcher)
    batcher_module.plan = timed  # type: ignore[assignment]
    whole: list[float] = []
    try:
        for number in range(num_steps):
            if long_prompts and number % 16 == 0:
                batcher.submit(submission(100_000 + number, 8_192), NoSink())
            began = time.perf_counter()
            _one_step(batcher)
            whole.append(time.perf_counter() - began)
    finally:
        batcher_module.plan = timed._plan
    return {
        "sequences": num_sequences,
        "long_prompts": long_prompts,
        "plan_ms": round(1e3 * statistics.median(timed.seconds), 3),
        "whole_step_ms": round(1e3 * statistics.median(whole), 3),
    }


def _is_prefilling(batcher: Batcher) -> bool:
    return any(len(s.token_ids) <= s.prompt_len for s in batcher.roster.ledger.running)


def _one_step(batcher: Batcher) -> None:
    """Plan, encode, answer, commit: what the scheduler does per step, the shard left out."""
    step = batcher.next_step()
    assert step is not None
    encode(1, step).SerializeToString()
    batcher.commit(answer(step))


def main() -> None:
    """Measures, prints a table, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    gc.disable()
    cases = ((32, False), (256, False), (32, True), (256, True))
    rows = [measure(count, flags.steps, long_prompts) for count, long_prompts in cases]
    print(f"{'sequences':>10} {'long prompts':>13} {'plan ms':>8} {'whole step ms':>14}")
    for row in rows:
        arriving = "yes" if row["long_prompts"] else "no"
        print(
            f"{row['sequences']:>10} {arriving:>13} {row['plan_ms']:>8} {row['whole_step_ms']:>14}"
        )
    if flags.json:
        result = {"machine": describe(), "rows": rows}
        flags.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
