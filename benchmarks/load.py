"""A closed-loop load on any OpenAI-compatible URL: so many streams, each one after another.

Prompts are random token ids, distinct unless a shared prefix is asked for, and sampled, so that no
server may answer one from another. `python -m benchmarks.load --help` for the flags.
"""

import argparse
import asyncio
import dataclasses
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked, equal for every contestant."""

    prompt_tokens: int = 128
    output_tokens: int = 64
    shared_prefix_tokens: int = 0
    vocab: tuple[int, int] = (300, 2000)
    temperature: float = 1.0
    seed: int = 0

    def prompts(self, count: int) -> list[list[int]]:
        """`count` prompts of token ids; the same for the same workload."""
        draw = random.Random(self.seed)
        prefix = [draw.randrange(*self.vocab) for _ in range(self.shared_prefix_tokens)]
        rest = self.prompt_tokens - self.shared_prefix_tokens
        return [prefix + [draw.randrange(*self.vocab) for _ in range(rest)] for _ in range(count)]


@dataclass(slots=True)
class Timeline:
    """When one request was sent and when each of its chunks came; seconds."""

    sent_s: float
    chunks_s: list[float] = field(default_factory=list)
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """One run's figures. TTFT: time to first token. ITL: inter-token latency."""

    concurrency: int
    requests: int
    output_tokens: int
    wall_s: float
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float


async def run_load(
    url: str,
    model: str,
    workload: Workload,
    concurrency: int,
    requests: int,
    api_key: str = "local",
) -> Report:
    """Sends `requests` prompts over `concurrency` streams and reports."""
    waiting = workload.prompts(requests)
    done: list[Timeline] = []
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    headers = {"Authorization": f"Bearer {api_key}"}
    async with httpx.AsyncClient(limits=limits, timeout=600, headers=headers) as client:

        async def stream() -> None:
            while waiting:
                done.append(await _request(client, url, model, workload, waiting.pop()))

        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(concurrency):
                tasks.create_task(stream())
        wall_s = time.perf_counter() - began
    return _report(done, concurrency, wall_s)


async def _request(
    client: httpx.AsyncClient, url: str, model: str, workload: Workload, prompt: list[int]
) -> Timeline:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": workload.output_tokens,
        # masks EOS, which would end the answer, or be sampled and leave nothing to show
        "min_tokens": workload.output_tokens,
        "temperature": workload.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    timeline = Timeline(time.perf_counter())
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise RuntimeError(f"HTTP {response.status_code}: {response.text[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[len("data: ") :])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if event.get("usage"):
                timeline.output_tokens = event["usage"]["completion_tokens"]
            if event["choices"]:
                timeline.chunks_s.append(time.perf_counter())
    return timeline


def _report(done: list[Timeline], concurrency: int, wall_s: float) -> Report:
    first = [one.chunks_s[0] - one.sent_s for one in done]
    between = [
        later - earlier
        for one in done
        for earlier, later in zip(one.chunks_s, one.chunks_s[1:], strict=False)
    ]
    output_tokens = sum(one.output_tokens for one in done)
    return Report(
        concurrency=concurrency,
        requests=len(done),
        output_tokens=output_tokens,
        wall_s=round(wall_s, 3),
        tokens_per_s=round(output_tokens / wall_s, 1),
        ttft_p50_ms=_ms(first, 50),
        ttft_p99_ms=_ms(first, 99),
        itl_p50_ms=_ms(between, 50),
        itl_p99_ms=_ms(between, 99),
    )


def _ms(seconds: list[float], percentile: int) -> float:
    if len(seconds) < 2:
        return round(1000 * sum(seconds), 2)
    return round(1000 * statistics.quantiles(seconds, n=100, method="inclusive")[percentile - 1], 2)


def print_table(reports: list[Report]) -> None:
    """One row per report."""
    names = [item.name for item in dataclasses.fields(Report)]
    print(" ".join(f"{name:>14}" for name in names))
    for report in reports:
        print(" ".join(f"{getattr(report, name):>14}" for name in names))


def main() -> None:
    """Parses the flags, runs each concurrency, prints a table, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--api-key", default="local")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests-per-stream", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--shared-prefix-tokens", type=int, default=0)
    parser.add_argument("--max-token-id", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    reports = []
    for index, concurrency in enumerate(flags.concurrency):
        workload = Workload(
            prompt_tokens=flags.prompt_tokens,
            output_tokens=flags.output_tokens,
            shared_prefix_tokens=flags.shared_prefix_tokens,
            vocab=(300, flags.max_token_id),
            seed=index,
        )
        requests = concurrency * flags.requests_per_stream
        reports.append(
            asyncio.run(
                run_load(flags.url, flags.model, workload, concurrency, requests, flags.api_key)
            )
        )
    print_table(reports)
    if flags.json:
        flags.json.write_text(json.dumps([dataclasses.asdict(r) for r in reports], indent=2))


if __name__ == "__main__":
    main()
