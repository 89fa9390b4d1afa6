"""The load generator: streams over HTTP to any OpenAI-compatible URL, and what became of each.

It shares its machine with what it measures, so it is made of libraries that take little of that. A
closed loop is so many clients, each with one request after another; an open loop sends at random
times (Poisson), however many are under way. `python -m benchmarks.load --help` for the flags.
"""

import argparse
import asyncio
import dataclasses
import itertools
import json
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import aiohttp
import uvloop

from benchmarks.machine import describe, keep
from benchmarks.timeline import Report, Timeline, print_table, report
from benchmarks.workload import Prompt, Workload

# How a server is told to give all output tokens, whatever it samples. `min_tokens` masks EOS, which
# `ignore_eos` lets be sampled, with nothing to show.
FULL_LENGTH = ("min_tokens", "ignore_eos")

Ask: TypeAlias = Callable[[Prompt, float], Coroutine[Any, Any, Timeline]]


@dataclass(frozen=True, slots=True)
class Target:
    """A server, and what its requests need.

    Attributes:
        full_length: those of FULL_LENGTH that it is sent.
        extra: further fields of the body.
    """

    url: str
    model: str
    api_key: str = "local"
    full_length: tuple[str, ...] = ("min_tokens",)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_mesh(cls, facts: Mapping[str, Any], **options: Any) -> Self:
        """The first model of a mesh, by its ready file."""
        return cls(facts["url"], facts["models"][0], facts["api_key"], **options)


class Client:
    """Sends a workload's prompts to one target; an async context manager."""

    def __init__(
        self, target: Target, workload: Workload, headers: Mapping[str, str] | None = None
    ) -> None:
        self._url = f"{target.url}/v1/completions"
        length = {"min_tokens": workload.output_tokens, "ignore_eos": True}
        self._body = {
            "model": target.model,
            "max_tokens": workload.output_tokens,
            "temperature": workload.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: length[name] for name in target.full_length},
            **target.extra,
        }
        self._headers = {"Authorization": f"Bearer {target.api_key}", **(headers or {})}

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(sock_connect=600, sock_read=600),
            headers=self._headers,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def ask(self, prompt: Prompt, due_s: float, timeline: Timeline | None = None) -> Timeline:
        """One streamed completion; what fails is in the timeline's `error`.

        Args:
            due_s: on `time.perf_counter`.
            timeline: filled as it goes, for who wants to see it before the end.
        """
        timeline = Timeline(due_s) if timeline is None else timeline
        timeline.due_s = due_s
        body = {**self._body, "prompt": prompt}
        try:
            async with self._http.post(self._url, json=body) as response:
                if response.status == 200:
                    await _read(response, timeline)
                else:
                    _refused(response.status, await response.text(), timeline)
        except (aiohttp.ClientError, TimeoutError) as error:
            timeline.error, timeline.message = type(error).__name__, str(error)
        timeline.ended_s = time.perf_counter()
        return timeline


async def _read(response: aiohttp.ClientResponse, timeline: Timeline) -> None:
    """Takes the events of a stream until it ends."""
    is_done = False
    async for line in response.content:
        if not line.startswith(b"data: {"):
            is_done = is_done or line.rstrip() == b"data: [DONE]"
            continue
        event = json.loads(line[len(b"data: ") :])
        if "error" in event:
            _failed(event["error"], timeline)
            return
        if usage := event.get("usage"):
            timeline.output_tokens = usage["completion_tokens"]
            timeline.prompt_tokens = usage["prompt_tokens"]
        if any(choice.get("text") for choice in event["choices"]):
            timeline.chunks_s.append(time.perf_counter())
    if not is_done:
        timeline.error, timeline.message = "cut_off", "the stream ended without [DONE]"


def _refused(status: int, text: str, timeline: Timeline) -> None:
    try:
        _failed(json.loads(text)["error"], timeline)
    except (ValueError, KeyError, TypeError):
        timeline.error, timeline.message = f"http_{status}", text[:300]


def _failed(error: Mapping[str, Any], timeline: Timeline) -> None:
    timeline.error = str(error.get("code") or error.get("type") or "error")
    timeline.message = str(error.get("message"))


async def closed_loop(ask: Ask, prompts: Iterator[Prompt], streams: int) -> list[Timeline]:
    """So many streams until the prompts are used up, in the order of their ends."""
    done: list[Timeline] = []

    async def stream() -> None:
        for prompt in prompts:
            answer = await ask(prompt, time.perf_counter())
            done.append(answer)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(streams):
            tasks.create_task(stream())
    return done


async def open_loop(
    ask: Ask, prompts: Iterator[Prompt], per_second: float, draw: random.Random
) -> list[Timeline]:
    """Poisson arrivals until the prompts are used up, then until all have ended."""
    tasks: list[asyncio.Task[Timeline]] = []
    async with asyncio.TaskGroup() as group:
        due_s = time.perf_counter()
        for prompt in prompts:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            tasks.append(group.create_task(ask(prompt, due_s)))
            due_s += draw.expovariate(per_second)
    return [task.result() for task in tasks]


def lasting(seconds: float, prompts: Iterator[Prompt]) -> Iterator[Prompt]:
    """Those that are taken within so many seconds from now."""
    end_s = time.perf_counter() + seconds
    return itertools.takewhile(lambda _: time.perf_counter() < end_s, prompts)


async def send(
    target: Target,
    workload: Workload,
    requests: int,
    streams: int = 0,
    per_second: float = 0.0,
) -> tuple[list[Timeline], float]:
    """Sends `requests` prompts from `streams` clients, or `per_second`; and how long it took."""
    prompts = iter(workload.prompts(requests))
    async with Client(target, workload) as client:
        began = time.perf_counter()
        if per_second > 0:
            arrivals = random.Random(workload.seed)
            done = await open_loop(client.ask, prompts, per_second, arrivals)
        else:
            done = await closed_loop(client.ask, prompts, streams)
        return done, time.perf_counter() - began


def run_load(target: Target, workload: Workload, streams: int, requests: int) -> Report:
    """A closed loop, where every request has to be answered.

    Raises:
        RuntimeError: one was not; rates of the rest would say nothing.
    """
    done, wall_s = uvloop.run(send(target, workload, requests, streams))
    failed = next((one for one in done if one.error is not None), None)
    if failed is not None:
        raise RuntimeError(f"{failed.error}: {failed.message}")
    return report(done, wall_s)


def main() -> None:
    """Parses the flags, runs each level, prints a table, writes JSON if asked."""
    flags = _parse()
    rows: list[tuple[str, Report]] = []
    kept: list[dict[str, Any]] = []
    target = Target(flags.url, flags.model, flags.api_key, tuple(flags.full_length))
    levels = [(0, rate) for rate in flags.rate] or [(count, 0.0) for count in flags.streams]
    for index, (streams, rate) in enumerate(levels):
        workload = Workload(
            prompt_tokens=flags.prompt_tokens,
            output_tokens=flags.output_tokens,
            shared_prefix_tokens=flags.shared_prefix_tokens,
            vocab=(flags.min_token_id, flags.max_token_id),
            temperature=flags.temperature,
            seed=flags.seed + index,
            as_text=flags.text,
        )
        count = flags.requests or max(1, streams) * flags.requests_per_stream
        done, wall_s = uvloop.run(send(target, workload, count, streams, rate))
        load = f"{rate}/s" if rate else str(streams)
        rows.append((load, report(done, wall_s)))
        kept.append(
            {
                "streams": streams or None,
                "per_second": rate or None,
                "workload": dataclasses.asdict(workload),
                "report": dataclasses.asdict(rows[-1][1]),
                "requests": [dataclasses.asdict(one) for one in done],
            }
        )
    print_table(rows)
    keep({"machine": describe(), "url": flags.url, "runs": kept}, flags.json)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--api-key", default="local")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32], help="closed loops")
    parser.add_argument("--rate", type=float, nargs="+", default=[], help="open loops, requests/s")
    parser.add_argument("--requests-per-stream", type=int, default=4)
    parser.add_argument("--requests", type=int, default=0, help="of each level, instead")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--shared-prefix-tokens", type=int, default=0)
    parser.add_argument("--text", action="store_true", help="prompts of words; lengths count them")
    parser.add_argument("--min-token-id", type=int, default=300)
    parser.add_argument("--max-token-id", type=int, default=2000)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--full-length", nargs="*", choices=FULL_LENGTH, default=["min_tokens"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="figures, and the timeline of every request")
    return parser.parse_args()


if __name__ == "__main__":
    main()
