"""Time to the first token behind a shared prefix that is warm, beside that of the new tokens alone.

Prompts of 512 common and 128 new tokens, and prompts of 128 new tokens, one at a time and by turns,
on one mesh. The bar: at most 1.15. The scheduler's own count says what was computed of each.
"""

import argparse
import asyncio
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.load import Client
from benchmarks.local_mesh import samples
from benchmarks.machine import describe, keep
from benchmarks.paired import paired_ratio
from benchmarks.peers.infermesh import mesh_facts, target_of
from benchmarks.peers.model import SHAPE, TEXT_IDS
from benchmarks.peers.peer import PRECISIONS
from benchmarks.workload import Prompt, Workload

BAR = 1.15
NEW = Workload(prompt_tokens=128, output_tokens=1, vocab=TEXT_IDS, temperature=0.0)
BEHIND = dataclasses.replace(NEW, prompt_tokens=640, shared_prefix_tokens=512, seed=1)
WARM_UP = 3


class Asker:
    """One mesh, asked one prompt at a time."""

    def __init__(self, facts: dict[str, Any], client: Client) -> None:
        self._client = client
        self._metrics = next(s["metrics"] for s in facts["services"] if s["name"] == "scheduler-0")

    async def ask(self, prompts: Iterator[Prompt]) -> tuple[float, int]:
        """Milliseconds to the first token of the next prompt, and how many tokens were computed."""
        before = await self._num_computed()
        answer = await self._client.ask(next(prompts), time.perf_counter())
        if answer.error is not None:
            raise RuntimeError(f"{answer.error}: {answer.message}")
        return 1000 * answer.ttft_s, await self._num_computed() - before

    async def _num_computed(self) -> int:
        found = await asyncio.to_thread(samples, self._metrics)
        return round(found["prompt_tokens_computed_total"])


async def measure(
    facts: dict[str, Any], rounds: int, new: Workload = NEW, behind_prefix: Workload = BEHIND
) -> dict[str, Any]:
    """Pairs, in alternating order, after some to warm both up."""
    behind, alone = behind_prefix.endless(), new.endless()
    pairs: list[tuple[tuple[float, int], tuple[float, int]]] = []
    async with Client(target_of(facts), new) as client:
        asker = Asker(facts, client)
        for number in range(WARM_UP + rounds):
            if number % 2:
                first = await asker.ask(behind)
                pairs.append((first, await asker.ask(alone)))
            else:
                second = await asker.ask(alone)
                pairs.append((await asker.ask(behind), second))
    return _summary(pairs[WARM_UP:])


def _summary(pairs: list[tuple[tuple[float, int], tuple[float, int]]]) -> dict[str, Any]:
    ratio = paired_ratio([(behind[0], alone[0]) for behind, alone in pairs])
    return {
        "behind_prefix_ttft_p50_ms": round(statistics.median(one[0] for one, _ in pairs), 1),
        "new_tokens_alone_ttft_p50_ms": round(statistics.median(one[0] for _, one in pairs), 1),
        "computed_behind_prefix": sorted({one[1] for one, _ in pairs}),
        "computed_alone": sorted({one[1] for _, one in pairs}),
        "ratio": dataclasses.asdict(ratio),
        "bar": BAR,
        "verdict": ratio.verdict(BAR),
    }


def main() -> None:
    """Measures, prints, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    with mesh_facts(flags.precision) as facts:
        measured = asyncio.run(measure(facts, flags.rounds))
    result = {
        "machine": describe(),
        "shape": SHAPE,
        "precision": flags.precision,
        "rounds": flags.rounds,
        **measured,
    }
    print(json.dumps(result, indent=2))
    keep(result, flags.json)


if __name__ == "__main__":
    main()
