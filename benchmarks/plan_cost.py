"""What the scheduler's own work costs per step: `plan` alone, and all of it, on one core.

All of it is: plan, the step's bytes, the result's bytes read and taken, the message to the gateway
and its bytes; the transport is left out. Every sequence decodes, at lengths that fill a block in
turn; results are made up outside of the clock. Bars: all of it ≤ 0.3 ms at 32 sequences, ≤ 1.5 ms
at 256. Further lines have prompts of 8,192 tokens arriving chunk by chunk beside them, also under
a target for the streams, or tenants that wait with four requests each and find no slot.
"""

import argparse
import asyncio
import gc
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, keep
from infermesh.v1 import sampling_pb2
from infermesh.v1 import shard_service_pb2 as pb
from services.scheduler import batcher as batcher_module
from services.scheduler.batcher import Batcher, BatcherSettings
from services.scheduler.intake import ModelFacts, Submission
from services.scheduler.ledger import AppliedStep, Capacity
from services.scheduler.outbox import MAX_UNREAD_PER_CHOICE, Outbox
from services.scheduler.sequence import Sampling
from services.scheduler.stats import Stats
from services.scheduler.steps import encode

MODEL = ModelFacts("model", "fingerprint", 32_768, 32_000, frozenset({2}))
BLOCK_SIZE = 16
BUDGET = 512


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


def submission(stream_id: int, prompt_len: int, tenant: str = "tenant") -> Submission:
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
        tenant=tenant,
        tenant_weight=1.0,
        remaining_s=None,
        sharing_domain="tenant",
        traceparent="",
    )


def answer(step: AppliedStep) -> bytes:
    """A result in which every sampling row drew token 7, after a time that suits the step."""
    timings = pb.StepTimings(execute_us=4_000 + 20 * step.num_tokens)
    decoded = [7] * step.num_decodes
    result = pb.StepResult(step_id=step.step_id, decoded=decoded, timings=timings)
    for row in step.rows[step.num_decodes :]:
        token_ids = [7] if row.samples else []
        result.rows.add(slot=row.placement.slot, status=pb.ROW_STATUS_OK, token_ids=token_ids)
    return result.SerializeToString()


class Scheduler:
    """A batcher and one gateway's outbox."""

    def __init__(self, num_slots: int, target_itl_s: float | None = None) -> None:
        capacity = Capacity(64_000, BLOCK_SIZE, num_slots, BUDGET)
        settings = BatcherSettings(target_itl_s=target_itl_s)
        self.batcher = Batcher(settings, MODEL, capacity, Stats(), time.monotonic)
        self.batcher.open_epoch(capacity, contents_survive=False)
        self._outbox = Outbox(MAX_UNREAD_PER_CHOICE, lambda request: None, lambda request: None)
        self._outbox.packs_tokens = True

    def submit(self, stream_id: int, prompt_len: int, tenant: str = "tenant") -> None:
        """Hands in a request."""
        self.batcher.submit(submission(stream_id, prompt_len, tenant), self._outbox)

    @property
    def num_decoding(self) -> int:
        """Sequences that have their prompt behind them."""
        return sum(len(s.token_ids) > s.prompt_len for s in self.batcher.roster.ledger.running)

    async def step(self) -> float:
        """One step, from its plan to the gateway's bytes; its seconds."""
        began = time.perf_counter()
        step = self.batcher.next_step()
        assert step is not None
        encode(1, step, packs_rows=True).SerializeToString()
        spent = time.perf_counter() - began
        data = answer(step)
        began = time.perf_counter()
        self.batcher.commit(pb.StepResult.FromString(data))
        message = await self._outbox.take()
        assert message is not None
        message.SerializeToString()
        return spent + time.perf_counter() - began


async def measure(
    num_sequences: int,
    num_steps: int,
    long_prompts: bool,
    num_tenants: int,
    target_itl_s: float | None = None,
) -> dict[str, Any]:
    """Medians over `num_steps` steps with `num_sequences` decoding in each."""
    scheduler = Scheduler(num_sequences + (0 if num_tenants else 8), target_itl_s)
    for stream_id in range(num_sequences):
        scheduler.submit(stream_id, 128 + stream_id % BLOCK_SIZE)
    while scheduler.num_decoding < num_sequences:
        await scheduler.step()
    for number in range(4 * num_tenants):
        scheduler.submit(200_000 + number, 16, f"tenant-{number // 4}")
    batcher_module.plan = timed = TimedPlan()  # type: ignore[assignment]
    whole: list[float] = []
    try:
        for number in range(num_steps):
            if long_prompts and number % 16 == 0:
                scheduler.submit(100_000 + number, 8_192)
            whole.append(await scheduler.step())
    finally:
        batcher_module.plan = timed._plan
    return {
        "sequences": num_sequences,
        "long_prompts": long_prompts,
        "waiting_tenants": num_tenants,
        "target_itl_ms": None if target_itl_s is None else 1e3 * target_itl_s,
        "plan_ms": round(1e3 * statistics.median(timed.seconds), 3),
        "whole_step_ms": round(1e3 * statistics.median(whole), 3),
    }


def main() -> None:
    """Measures, prints a table, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    gc.disable()
    cases = (
        *((32, False, 0), (256, False, 0), (32, True, 0), (256, True, 0)),
        *((32, True, 0, 0.009), (256, True, 0, 0.018)),
        *((32, False, 32), (256, False, 256), (256, False, 1000)),
    )
    rows = [asyncio.run(measure(count, flags.steps, *more)) for count, *more in cases]
    print(
        f"{'sequences':>10} {'long prompts':>13} {'waiting tenants':>16} {'target':>6} "
        f"{'plan ms':>8} {'whole step ms':>14}"
    )
    for row in rows:
        arriving = "yes" if row["long_prompts"] else "no"
        print(
            f"{row['sequences']:>10} {arriving:>13} {row['waiting_tenants']:>16} "
            f"{row['target_itl_ms'] or '':>6} {row['plan_ms']:>8} {row['whole_step_ms']:>14}"
        )
    keep({"machine": describe(), "rows": rows}, flags.json)


if __name__ == "__main__":
    main()
