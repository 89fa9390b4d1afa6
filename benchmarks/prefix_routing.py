"""What routing by prefix saves: prompt tokens computed for conversations over several replicas.

Conversations share a system prompt; their turns come in random order, eight at a time. The same
workload runs with each `gateway.routing`, on a mesh of its own with the simulated engine. All the
replicas' KV blocks together have room for every conversation, one replica's for one in three. Bar:
`prefix` computes at most 0.4 of the prompt tokens of `round_robin`, by the schedulers' own count.
"""

import argparse
import asyncio
import dataclasses
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.local_mesh import local_mesh, samples
from benchmarks.machine import describe, keep

BAR = 0.4
POLICIES = ("round_robin", "least_loaded", "prefix")
WORDS = (
    "river",
    "stone",
    "light",
    "paper",
    "green",
    "window",
    "garden",
    "music",
    "table",
    "winter",
)
COUNTED = (
    "prompt_tokens_total",
    "prompt_tokens_computed_total",
    "prefix_cache_hits_total",
    "generation_tokens_total",
)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked, equal for every policy; a word is about 2 tokens."""

    conversations: int = 32
    turns: int = 12
    system_words: int = 200
    user_words: int = 20
    answer_tokens: int = 24
    concurrency: int = 8
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Fleet:
    """What it is asked of."""

    replicas: int = 4
    num_blocks: int = 672
    block_size: int = 16

    def flags(self, policy: str) -> list[str]:
        """Of `infermesh up`."""
        settings = {
            "gateway.routing": policy,
            "scheduler.num_blocks": self.num_blocks,
            "scheduler.block_size": self.block_size,
        }
        pairs = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        return ["--engine", "simulated", "--no-cache", "--replicas", str(self.replicas), *pairs]


async def converse(facts: dict[str, Any], workload: Workload) -> list[float]:
    """Runs every conversation to its end; each turn's seconds to the first text."""
    draw = random.Random(workload.seed)
    system = _words(draw, workload.system_words)
    waiting = [[{"role": "system", "content": system}] for _ in range(workload.conversations)]
    questions = {
        id(one): [_words(draw, workload.user_words) for _ in range(workload.turns)]
        for one in waiting
    }
    seconds: list[float] = []
    headers = {"Authorization": f"Bearer {facts['api_key']}"}
    async with httpx.AsyncClient(base_url=facts["url"], headers=headers, timeout=120) as client:

        async def talk() -> None:
            while waiting:
                messages = waiting.pop(draw.randrange(len(waiting)))
                left = questions[id(messages)]
                messages.append({"role": "user", "content": left.pop()})
                body = {
                    "model": facts["models"][0],
                    "messages": messages,
                    "max_tokens": workload.answer_tokens,
                    "temperature": 1.0,  # sampled: no answer is shared
                }
                first_s, answer = await _turn(client, body)
                seconds.append(first_s)
                messages.append({"role": "assistant", "content": answer})
                if left:
                    waiting.append(messages)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(workload.concurrency):
                tasks.create_task(talk())
    return seconds


async def _turn(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[float, str]:
    began, first_s, text = time.perf_counter(), 0.0, ""
    async with client.stream(
        "POST", "/v1/chat/completions", json={**body, "stream": True}
    ) as response:
        if response.status_code != 200:
            await response.aread()
            raise RuntimeError(f"HTTP {response.status_code}: {response.text[:300]}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[len("data: ") :])["choices"]:
                    piece = choice["delta"].get("content") or ""
                    first_s = first_s or (time.perf_counter() - began if piece else 0.0)
                    text += piece
    return first_s, text


def _words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(count))


def count(facts: dict[str, Any]) -> dict[str, Any]:
    """The schedulers' own counts, summed, and how the computed tokens spread over them."""
    found = dict.fromkeys(COUNTED, 0.0)
    spread = []
    for service in facts["services"]:
        if service["name"].startswith("scheduler-"):
            counts = samples(service["metrics"])
            spread.append(round(counts["prompt_tokens_computed_total"]))
            for name in COUNTED:
                found[name] += counts[name]
    gateway = samples(facts["admin_url"].removeprefix("http://"))
    matched = gateway.get("prefix_matched_tokens_total", 0.0)
    return {
        **{name: round(value) for name, value in found.items()},
        "prefix_matched_tokens_total": round(matched),
        "computed_by_replica": spread,
    }


def measure(policy: str, workload: Workload, fleet: Fleet) -> dict[str, Any]:
    """One policy's run on a mesh of its own."""
    with local_mesh(*fleet.flags(policy)) as facts:
        seconds = asyncio.run(converse(facts, workload))
        counts = count(facts)
    return {
        "policy": policy,
        "seed": workload.seed,
        "turns": len(seconds),
        "ttft_p50_ms": round(1e3 * statistics.median(seconds), 1),
        "ttft_p95_ms": round(1e3 * statistics.quantiles(seconds, n=20)[-1], 1),
        **counts,
    }


def compare(rounds: int, workload: Workload, fleet: Fleet) -> dict[str, Any]:
    """Every policy in each round, on equal conversations; ratios of computed prompt tokens."""
    runs: list[dict[str, Any]] = []
    for seed in range(rounds):
        own = dataclasses.replace(workload, seed=seed)
        for policy in POLICIES:
            runs.append(measure(policy, own, fleet))
            print(json.dumps(runs[-1]), flush=True)
    computed = {
        policy: [run["prompt_tokens_computed_total"] for run in runs if run["policy"] == policy]
        for policy in POLICIES
    }
    ratios = [p / r for p, r in zip(computed["prefix"], computed["round_robin"], strict=True)]
    return {
        "machine": describe(),
        "workload": dataclasses.asdict(workload),
        "fleet": dataclasses.asdict(fleet),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "worst_ratio": round(max(ratios), 3),
        "bar": BAR,
        "is_met": max(ratios) <= BAR,
        "runs": runs,
    }


def main() -> None:
    """Parses the flags, measures, prints, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    for kind in (Workload, Fleet):
        for item in dataclasses.fields(kind):
            flag = f"--{item.name.replace('_', '-')}"
            parser.add_argument(flag, type=int, default=item.default)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    flags = vars(parser.parse_args())
    made = [
        kind(**{item.name: flags[item.name] for item in dataclasses.fields(kind)})
        for kind in (Workload, Fleet)
    ]
    result = compare(flags["rounds"], *made)
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=2))
    keep(result, flags["json"])


if __name__ == "__main__":
    main()
