"""A long prompt that arrives beside decoding streams: what it does to them, and they to it.

Through HTTP, on two meshes with one replica, one with `--target-itl-ms` and one without, which take
turns. The target is r = 2 times what decoding alone takes, as the mesh without one shows first.
Bars, with the target: the streams' p99 inter-token latency (ITL) while the prompt is computed is at
most r times their p99 before (and, what is harder, their median before), and its time to first
token (TTFT) at most 1.15 * r / (r - 1) times that on the idle mesh: decoding leaves it
(r - 1) / r of each step.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.load import Client, Target
from benchmarks.local_mesh import local_mesh, samples, simulated_mesh
from benchmarks.machine import describe, keep
from benchmarks.paired import paired_ratio
from benchmarks.shapes import make_shape
from benchmarks.timeline import Timeline, percentile_ms
from benchmarks.workload import Workload

R = 2.0
TTFT_BAR = 1.15 * R / (R - 1)
# Nobody's deadline is at stake: estimates from one long step would refuse streams.
PATIENT = ("--max-model-len", "16384", "--set", "gateway.request_timeout_s=100000")
# The built-in one, ten times as slow: whoever measures shares two cores with the mesh, and what
# they add to a step must be small beside it.
PROFILE = {
    "fixed_us": 40_000,
    "per_prefill_token_us": 200,
    "per_decode_row_us": 400,
    "per_context_token_us": 0.2,
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """What is watched: so many streams decode, and after so many tokens of each a prompt comes."""

    prompt_tokens: int = 4096
    streams: int = 16
    tokens_before: int = 60
    stream_prompt_tokens: int = 32
    # More than they get to.
    stream_tokens: int = 1000
    seed: int = 0


# What is run on which engine. A CPU of two cores needs seconds for as many tokens of a real model
# as a GPU computes in a blink.
SETUPS = {
    "simulated": ("simulated", "demo-16k", Arrival()),
    "torch": ("torch", "demo-16k", Arrival()),
    "torch-qwen2.5-0.5b": ("torch", "qwen2.5-0.5b", Arrival(prompt_tokens=256, tokens_before=12)),
}


@dataclass(slots=True)
class Seen:
    """Seconds. The gaps are those between tokens of all streams, before the prompt was sent and
    from then until its first token.

    Attributes:
        steps: that were executed meanwhile.
        budget: query tokens that a step could hold then, by the scheduler's own word.
    """

    idle_ttft_s: float
    ttft_s: float
    gaps_before_s: list[float]
    gaps_beside_s: list[float]
    steps: int
    budget: int

    @property
    def p99_over_p99(self) -> tuple[float, float]:
        """The streams' p99 beside the prompt, and before."""
        return percentile_ms(self.gaps_beside_s, 99), percentile_ms(self.gaps_before_s, 99)

    @property
    def p99_over_p50(self) -> tuple[float, float]:
        """The streams' p99 beside the prompt, and their median before."""
        return self.p99_over_p99[0], percentile_ms(self.gaps_before_s, 50)

    @property
    def ttft_over_idle(self) -> tuple[float, float]:
        """The prompt's beside the streams, and on the idle mesh."""
        return self.ttft_s, self.idle_ttft_s


async def watch(facts: dict[str, Any], arrival: Arrival) -> Seen:
    """One arrival on an idle mesh and, with a like prompt, one beside the streams."""
    draw = random.Random(arrival.seed)
    target = Target.of_mesh(facts)
    metrics = next(s["metrics"] for s in facts["services"] if s["name"] == "scheduler-0")
    one_token = Workload(output_tokens=1)
    many_tokens = Workload(output_tokens=arrival.stream_tokens)
    async with Client(target, one_token) as prompts, Client(target, many_tokens) as decoding:

        async def ask(client: Client, num_tokens: int, timeline: Timeline) -> None:
            prompt = [draw.randrange(300, 2000) for _ in range(num_tokens)]
            await client.ask(prompt, time.perf_counter(), timeline)
            if timeline.error is not None:
                raise RuntimeError(f"{timeline.error}: {timeline.message}")

        idle, beside = Timeline(0.0), Timeline(0.0)
        await ask(prompts, arrival.prompt_tokens, idle)
        streams = [Timeline(0.0) for _ in range(arrival.streams)]
        async with _running(ask(decoding, arrival.stream_prompt_tokens, one) for one in streams):
            await _until_tokens(streams, 4)  # all decode
            began = max(one.chunks_s[-1] for one in streams)
            await _until_tokens(streams, arrival.tokens_before)
            steps = samples(metrics)["steps_total"]
            await ask(prompts, arrival.prompt_tokens, beside)
            after = samples(metrics)
    return Seen(
        idle.ttft_s,
        beside.ttft_s,
        _gaps(streams, began, beside.due_s),
        _gaps(streams, beside.due_s, beside.chunks_s[0]),
        round(after["steps_total"] - steps),
        round(after["step_budget_tokens"]),
    )


@contextlib.asynccontextmanager
async def _running(streams: Iterable[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """They run inside the block and are cancelled at its end."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in streams]
        yield
        for task in tasks:
            task.cancel()


async def _until_tokens(streams: Sequence[Timeline], count: int) -> None:
    while min(len(one.chunks_s) for one in streams) < count:  # noqa: ASYNC110  # lists fill
        await asyncio.sleep(0.005)


def _gaps(streams: Sequence[Timeline], began_s: float, end_s: float) -> list[float]:
    """Between tokens of a stream, where the later one came in that time."""
    return [
        later - earlier
        for one in streams
        for earlier, later in zip(one.chunks_s, one.chunks_s[1:], strict=False)
        if began_s < later <= end_s
    ]


def compare(setup: str, rounds: int) -> dict[str, Any]:
    """Both meshes alternate; the first round, in which the scheduler learns, does not count."""
    engine, shape, arrival = SETUPS[setup]
    with tempfile.TemporaryDirectory() as folder:
        model = ("--model", str(make_shape(shape, Path(folder))), *PATIENT)
        with _mesh(engine, *model) as without:
            before = asyncio.run(watch(without, arrival)).gaps_before_s
            target_ms = round(R * percentile_ms(before, 50), 1)
            with _mesh(engine, *model, "--target-itl-ms", str(target_ms)) as with_target:
                rows = _alternate({"with": with_target, "without": without}, arrival, rounds)
                address = next(
                    s["metrics"] for s in with_target["services"] if s["name"] == "scheduler-0"
                )
                counted = samples(address)
    expected, took = (counted[f"step_{name}_seconds_total"] for name in ("expected", "device"))
    return {
        "setup": setup,
        "arrival": dataclasses.asdict(arrival),
        "target_itl_ms": target_ms,
        "took_over_expected": round(took / expected, 3),
        "with_target": _summary(rows["with"]),
        "without_target": _summary(rows["without"]),
    }


def _mesh(engine: str, *flags: str) -> AbstractContextManager[dict[str, Any]]:
    if engine == "simulated":
        return simulated_mesh(PROFILE, *flags)
    return local_mesh("--no-cache", "--load-format", "dummy", *flags)


def _alternate(
    meshes: dict[str, dict[str, Any]], arrival: Arrival, rounds: int
) -> dict[str, list[Seen]]:
    rows: dict[str, list[Seen]] = {name: [] for name in meshes}
    for number in range(rounds + 1):
        order = list(meshes) if number % 2 else list(reversed(meshes))
        for name in order:
            one = dataclasses.replace(arrival, seed=1 + number)
            seen = asyncio.run(watch(meshes[name], one))
            if number:
                rows[name].append(seen)
            print(f"{number:>3} {name:>8} {json.dumps(_line(seen))}", flush=True)
    return rows


def _line(seen: Seen) -> dict[str, float]:
    return {
        "itl_p50_before_ms": percentile_ms(seen.gaps_before_s, 50),
        "itl_p99_before_ms": percentile_ms(seen.gaps_before_s, 99),
        "itl_p50_beside_ms": percentile_ms(seen.gaps_beside_s, 50),
        "itl_p99_beside_ms": percentile_ms(seen.gaps_beside_s, 99),
        "ttft_idle_ms": round(1e3 * seen.idle_ttft_s, 1),
        "ttft_beside_ms": round(1e3 * seen.ttft_s, 1),
        "steps": seen.steps,
        "budget": seen.budget,
    }


def _summary(rounds: Sequence[Seen]) -> dict[str, Any]:
    """Medians, and the ratios with their bars."""
    lines = [_line(seen) for seen in rounds]
    return {
        **{name: round(statistics.median(one[name] for one in lines), 2) for name in lines[0]},
        "itl_p99_over_p99_before": _judged([seen.p99_over_p99 for seen in rounds], R),
        "itl_p99_over_p50_before": _judged([seen.p99_over_p50 for seen in rounds], R),
        "ttft_over_idle": _judged([seen.ttft_over_idle for seen in rounds], TTFT_BAR),
    }


def _judged(pairs: Sequence[tuple[float, float]], bar: float) -> dict[str, Any]:
    """The median ratio with its 95 % interval, and what that says of the bar."""
    ratio = paired_ratio(pairs)
    every = [round(first / second, 3) for first, second in pairs]
    return {"bar": bar, **dataclasses.asdict(ratio), "verdict": ratio.verdict(bar), "all": every}


def main() -> None:
    """Parses the flags, measures, prints, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=["simulated", "torch"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    results = []
    for setup in flags.setups:
        results.append(compare(setup, flags.rounds))
        print(json.dumps(results[-1]), flush=True)
    keep({"machine": describe(), "r": R, "profile_us": PROFILE, "runs": results}, flags.json)


if __name__ == "__main__":
    main()
