"""What the prefix cache saves: prompt tokens computed for chats that come back turn by turn.

Chats share a system prompt; each turn sends all that was said, the answers as the token ids that
were generated, through HTTP to one replica with the simulated engine. Turns of all chats are
interleaved by drawn times of thought, which order them and are not waited for. Bar: with 16 chats,
512 common tokens, 6 turns of 50 tokens and answers of 64, at most 0.2 of the prompt tokens are
computed, by the scheduler's own count. `--pressure` compares eviction policies where
memory is short.
"""

import argparse
import asyncio
import dataclasses
import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.local_mesh import samples, simulated_mesh
from benchmarks.machine import describe, keep

BAR = 0.2
VOCAB = (300, 2000)
PROFILE = {"fixed_us": 1000, "per_prefill_token_us": 1, "per_decode_row_us": 1}
COUNTED = (
    "prompt_tokens_total",
    "prompt_tokens_computed_total",
    "prefix_cache_hits_total",
    "prefix_cache_partial_hits_total",
    "kv_block_copies_total",
    "prefix_cache_evictions_total",
)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked; lengths in tokens.

    Attributes:
        single_requests: between the turns of chats, of `single_tokens` after the system prompt.
        spread: over how many mean times of thought the chats begin.
    """

    chats: int = 16
    turns: int = 6
    system_tokens: int = 512
    user_tokens: int = 50
    answer_tokens: int = 64
    single_requests: int = 0
    single_tokens: int = 300
    spread: float = 1.0
    concurrency: int = 8
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Device:
    """Where it is asked."""

    num_blocks: int = 4096
    block_size: int = 16


# Chats that go on for long, with and without prompts that are asked once, and memory for some.
PRESSED = {
    "chats_and_single_requests": Workload(
        chats=60, turns=12, single_requests=500, single_tokens=600, spread=24.0, concurrency=4
    ),
    "chats_alone": Workload(chats=60, turns=12, spread=12.0, concurrency=4),
}
SHORT_OF_MEMORY = Device(num_blocks=1000)
POLICIES = ("value", "lru")


class Conversations:
    """The workload on one mesh: every request, each after the one before it in its chat."""

    def __init__(self, client: httpx.AsyncClient, model: str, workload: Workload) -> None:
        self._client = client
        self._model = model
        self._workload = workload
        self._draw = random.Random(workload.seed)
        self._places = asyncio.Semaphore(workload.concurrency)
        self._system = self._tokens(workload.system_tokens)
        self._said = [list(self._system) for _ in range(workload.chats)]

    async def run(self) -> None:
        """All of it, in the order in which requests are due."""
        last: dict[int, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as tasks:
            for chat in self._order():
                await self._places.acquire()
                if chat is None:
                    tasks.create_task(self._single(self._tokens(self._workload.single_tokens)))
                else:
                    words = self._tokens(self._workload.user_tokens)
                    last[chat] = tasks.create_task(self._turn(chat, words, last.get(chat)))

    def _order(self) -> list[int | None]:
        """Whose turn is due when; None is a single request. Times are in mean times of thought."""
        workload, draw = self._workload, self._draw
        due: list[tuple[float, int | None]] = []
        for chat in range(workload.chats):
            at = draw.uniform(0, workload.spread)
            for _ in range(workload.turns):
                due.append((at, chat))
                at += draw.expovariate(1.0)
        end = max(at for at, _ in due)
        due += [(draw.uniform(0, end), None) for _ in range(workload.single_requests)]
        return [chat for _, chat in sorted(due, key=lambda entry: entry[0])]

    async def _turn(self, chat: int, words: list[int], before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await before
        said = self._said[chat]
        said += words
        said += await self._ask(said)

    async def _single(self, words: list[int]) -> None:
        await self._ask(self._system + words)

    async def _ask(self, prompt: list[int]) -> list[int]:
        answer_tokens = self._workload.answer_tokens
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": answer_tokens,
            "min_tokens": answer_tokens,
            "temperature": 1.0,  # sampled: no answer is shared
            "return_token_ids": True,
        }
        try:
            response = await self._client.post("/v1/completions", json=body)
        finally:
            self._places.release()
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {response.text[:300]}")
        token_ids: list[int] = response.json()["choices"][0]["token_ids"]
        return token_ids

    def _tokens(self, count: int) -> list[int]:
        return [self._draw.randrange(*VOCAB) for _ in range(count)]


def measure(workload: Workload, device: Device, **settings: str) -> dict[str, Any]:
    """One run on a mesh of its own; `settings` are the scheduler's."""
    flags = {**dataclasses.asdict(device), **settings}
    pairs = [("--set", f"scheduler.{name}={value}") for name, value in flags.items()]
    with simulated_mesh(PROFILE, *(word for pair in pairs for word in pair)) as facts:
        asyncio.run(_converse(facts, workload))
        counts = _counts(facts)
    asked = counts["prompt_tokens_total"]
    ratio = round(counts["prompt_tokens_computed_total"] / asked, 4)
    return {**settings, "seed": workload.seed, "computed_ratio": ratio, **counts}


async def _converse(facts: dict[str, Any], workload: Workload) -> None:
    headers = {"Authorization": f"Bearer {facts['api_key']}"}
    async with httpx.AsyncClient(base_url=facts["url"], headers=headers, timeout=120) as client:
        await Conversations(client, facts["models"][0], workload).run()


def _counts(facts: dict[str, Any]) -> dict[str, int]:
    address = next(s["metrics"] for s in facts["services"] if s["name"] == "scheduler-0")
    found = samples(address)
    return {name: round(found[name]) for name in COUNTED}


def compare(rounds: int, pressed: Workload) -> dict[str, Any]:
    """Both policies on equal requests; the ratios of the prompt tokens that each computed."""
    runs: list[dict[str, Any]] = []
    for seed in range(rounds):
        for policy in POLICIES if seed % 2 else reversed(POLICIES):
            workload = dataclasses.replace(pressed, seed=seed)
            runs.append(measure(workload, SHORT_OF_MEMORY, kv_eviction=policy))
            print(json.dumps(runs[-1]), flush=True)
    computed = {(run["kv_eviction"], run["seed"]): run[COUNTED[1]] for run in runs}
    ratios = [computed["value", seed] / computed["lru", seed] for seed in range(rounds)]
    return {
        "workload": dataclasses.asdict(pressed),
        "value_over_lru": [round(ratio, 3) for ratio in ratios],
        "mean": round(statistics.mean(ratios), 3),
        "runs": runs,
    }


def main() -> None:
    """Parses the flags, measures, prints, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pressure", type=int, metavar="ROUNDS", default=0)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    result = measure(Workload(), Device())
    result |= {"bar": BAR, "is_met": result["computed_ratio"] <= BAR}
    print(json.dumps(result), flush=True)
    pressure: dict[str, Any] = {}
    for name, workload in PRESSED.items() if flags.pressure else ():
        pressure[name] = compare(flags.pressure, workload)
        print(name, pressure[name]["value_over_lru"], flush=True)
    device = dataclasses.asdict(SHORT_OF_MEMORY)
    keep(
        {"machine": describe(), "reuse": result, "device": device, "eviction": pressure},
        flags.json,
    )


if __name__ == "__main__":
    main()
