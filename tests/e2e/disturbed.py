"""Streams whose every feature must go on after a failover, and all that they delivered."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import openai

from tests.e2e.mesh_process import Mesh


@dataclass
class Answer:
    """One stream as its client saw it."""

    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    # token and its likeliest alternatives, per choice
    tokens: dict[int, list[tuple[str, tuple[str, ...]]]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    longest_gap_s: float = 0.0

    def same_as(self, other: Answer) -> bool:
        """Token for token; log-probabilities may differ by the order of a sum."""
        exact = ("texts", "reasons", "tokens", "usage", "error")
        close = all(
            abs(a - b) < 1e-3
            for choice, values in self.logprobs.items()
            for a, b in zip(values, other.logprobs[choice], strict=True)
        )
        return close and all(getattr(self, name) == getattr(other, name) for name in exact)


async def stream(mesh: Mesh, call: dict[str, Any], begun: asyncio.Event | None = None) -> Answer:
    """Reads one stream to its end; `begun` is set once there is some text."""
    answer, seen_at = Answer(), None
    async with mesh.async_openai(max_retries=0, timeout=180) as client:
        try:
            async for chunk in await client.chat.completions.create(
                model=mesh.model, stream=True, stream_options={"include_usage": True}, **call
            ):
                now = time.monotonic()
                if seen_at is not None:
                    answer.longest_gap_s = max(answer.longest_gap_s, now - seen_at)
                seen_at = now
                _take(answer, chunk)
                if begun is not None and sum(map(len, answer.texts.values())) > 40:
                    begun.set()
        except openai.APIError as error:
            answer.error = str(error.code)
    if begun is not None:
        begun.set()
    return answer


def _take(answer: Answer, chunk: Any) -> None:
    for choice in chunk.choices:
        index = choice.index
        answer.texts[index] = answer.texts.get(index, "") + (choice.delta.content or "")
        if choice.finish_reason:
            answer.reasons[index] = choice.finish_reason
        for one in (choice.logprobs.content or []) if choice.logprobs else []:
            top = tuple(entry.token for entry in one.top_logprobs)
            answer.tokens.setdefault(index, []).append((one.token, top))
            answer.logprobs.setdefault(index, []).append(one.logprob)
    if chunk.usage is not None:
        answer.usage = {
            "prompt": chunk.usage.prompt_tokens,
            "completion": chunk.usage.completion_tokens,
        }


async def calls(mesh: Mesh, num_tokens: int) -> list[dict[str, Any]]:
    """Greedy and seeded; penalties, log-probabilities, several choices, limits, a stop string.

    The seeds are such that no draw falls on the border of two tokens: who shares a batch moves
    probabilities by 1e-6.
    """

    def ask(text: str, **options: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": text}]
        options.setdefault("extra_body", {"ignore_eos": True})
        return {"messages": messages, "max_tokens": num_tokens, **options}

    stopped = ask("Tell me of colours", temperature=1.0, seed=17)
    whole = (await stream(mesh, stopped)).texts[0]
    at = len(whole) * 3 // 4  # it spans tokens, and comes late
    return [
        ask("Count to thirty", temperature=0, logprobs=True, top_logprobs=2),
        ask("Name the days", temperature=1.0, seed=5, n=2, presence_penalty=0.5),
        ask(
            "What is a cache?",
            temperature=1.0,
            seed=8,
            frequency_penalty=0.3,
            logprobs=True,
            extra_body={"min_tokens": num_tokens - 20, "repetition_penalty": 1.1},
        ),
        stopped | {"stop": [whole[at : at + 12]]},
    ]
