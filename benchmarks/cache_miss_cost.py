"""What the semantic cache costs a request that it can't answer: time to first token with the cache
on and no hits, beside the same mesh without it.

Two meshes with the demo model, one request at a time, the meshes taking turns with the same
question. Every question is new, and like many that the cache holds. `--set cache.words_first=false`
makes each lookup go the whole way, through embedding and search.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.local_mesh import local_mesh
from benchmarks.machine import describe, keep

BAR_MS = 3.0
THINGS = ("a token", "a prompt", "the moon", "a river", "gRPC", "a cache", "bread", "a violin")
FORMS = (
    "What is {a} plus {b}?",
    "How many {thing}s are there among {a} of {b}?",
    "Explain {thing} in {a} words and {b} letters.",
    "Would you rather have {a} apples or {b} pears beside {thing}?",
)


def questions(count: int, seed: int) -> list[str]:
    """Distinct questions in a few forms."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        facts = {"a": draw.randrange(1000), "b": draw.randrange(1000), "thing": draw.choice(THINGS)}
        found[draw.choice(FORMS).format(**facts)] = None
    return list(found)


def first_token_ms(client: httpx.Client, facts: dict[str, Any], question: str) -> tuple[float, str]:
    """Milliseconds to the first text of the streamed answer, and what the cache said."""
    body = {
        "model": facts["models"][0],
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 4,
        "stream": True,
    }
    began = time.perf_counter()
    first: float | None = None
    url = f"{facts['url']}/v1/chat/completions"
    with client.stream("POST", url, json=body, headers=bearer(facts)) as response:
        for line in response.iter_lines():
            if first is None and line.startswith("data: {"):
                choices = json.loads(line[len("data: ") :])["choices"]
                if choices and choices[0]["delta"].get("content"):
                    first = time.perf_counter() - began
        said = response.headers.get("infermesh-cache", "off")
        said += f" {response.headers.get('infermesh-cache-reason', '')}"
    if first is None:
        raise RuntimeError(f"no text in the answer to {question!r}")
    return first * 1e3, said.strip()


def bearer(facts: dict[str, Any]) -> dict[str, str]:
    """The mesh's own key."""
    return {"authorization": f"Bearer {facts['api_key']}"}


def wait_embedder(client: httpx.Client, facts: dict[str, Any]) -> None:
    """Until the cache's embedder answers."""
    while True:
        url = f"{facts['url']}/v1/models"
        listed = client.get(url, headers=bearer(facts)).json()["data"]
        if any(model["kind"] == "embed" for model in listed):
            return
        time.sleep(0.1)


def measure(rounds: int, warm_up: int, seed: int, flags: list[str]) -> dict[str, Any]:
    """Alternates the two meshes and compares their medians."""
    asked = questions(rounds + warm_up, seed)
    on: list[float] = []
    off: list[float] = []
    verdicts: dict[str, int] = {}
    with (
        httpx.Client(timeout=60) as client,
        local_mesh(*flags) as with_cache,
        local_mesh("--no-cache") as without,
    ):
        wait_embedder(client, with_cache)
        for number, question in enumerate(asked):
            pair = [(with_cache, on), (without, off)]
            for facts, times in pair if number % 2 else reversed(pair):
                ms, said = first_token_ms(client, facts, question)
                if number >= warm_up:
                    times.append(ms)
                    verdicts[said] = verdicts.get(said, 0) + 1
    low, high = bootstrap(on, off)
    return {
        "machine": describe(),
        "rounds": rounds,
        "on_ttft_p50_ms": round(statistics.median(on), 2),
        "off_ttft_p50_ms": round(statistics.median(off), 2),
        "added_p50_ms": round(statistics.median(on) - statistics.median(off), 2),
        "added_p50_95_ms": [round(low, 2), round(high, 2)],
        "added_p95_ms": round(percentile(on, 95) - percentile(off, 95), 2),
        "bar_ms": BAR_MS,
        "verdicts": verdicts,
    }


def percentile(values: list[float], percent: int) -> float:
    """Of a few hundred values."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def bootstrap(on: list[float], off: list[float], draws: int = 2000) -> tuple[float, float]:
    """The paired 95 % interval of the difference of the medians."""
    draw = random.Random(0)
    pairs = list(zip(on, off, strict=True))
    found = []
    for _ in range(draws):
        sample = draw.choices(pairs, k=len(pairs))
        medians = [statistics.median(side) for side in zip(*sample, strict=True)]
        found.append(medians[0] - medians[1])
    found.sort()
    return found[int(0.025 * draws)], found[int(0.975 * draws)]


def main() -> None:
    """Parses the flags, measures, prints, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="as infermesh up takes it")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    settings = [word for item in flags.set for word in ("--set", item)]
    result = measure(flags.rounds, flags.warm_up, flags.seed, settings)
    print(json.dumps(result, indent=2))
    keep(result, flags.json)


if __name__ == "__main__":
    main()
