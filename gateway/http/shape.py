"""What chat and completion answers have in common: their head, their parts, their usage."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from gateway.tokens import ChoiceDelta, FinishReason, LogprobEntry, Usage

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
# JSON has no infinity; the value that other servers send for an impossible token.
_LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class Head:
    """What every chunk of an answer repeats."""

    response_id: str
    model: str
    created: int
    system_fingerprint: str


@dataclass(slots=True)
class WholeChoice:
    """One choice put together from its deltas."""

    index: int
    text: list[str] = field(default_factory=list)
    logprobs: list[LogprobEntry] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: ChoiceDelta) -> None:
        """Appends a delta."""
        self.text.append(delta.text)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason


class Shape(Protocol):
    """Renders one answer, streamed or whole."""

    def opening(self, num_choices: int) -> bytes:
        """Events that go out at admission."""

    def chunk(self, delta: ChoiceDelta) -> bytes:
        """The event, or events, of new text."""

    def usage(self, usage: Usage) -> bytes:
        """The event that carries usage; empty where the client did not ask for it."""

    def whole(self, choices: Iterable[WholeChoice], usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""


def usage_json(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
    }


def finite(logprob: float) -> float:
    """A logprob as JSON can hold it."""
    return max(logprob, _LOWEST_LOGPROB)


class ChunkFrame:
    """The constant parts of a streamed answer's events, rendered once per request.

    Args:
        kind: `object` of a chunk.
        with_usage: chunks carry `usage: null`, as OpenAI's do where usage was asked for.
    """

    def __init__(self, head: Head, kind: str, with_usage: bool) -> None:
        fixed = orjson.dumps(
            {
                "id": head.response_id,
                "object": kind,
                "created": head.created,
                "model": head.model,
                "system_fingerprint": head.system_fingerprint,
            }
        )
        self._start = b"data: " + fixed[:-1] + b',"choices":['
        self._end = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        self._with_usage = with_usage

    def event(self, choice: bytes) -> bytes:
        """A chunk with one choice, given as JSON."""
        return self._start + choice + self._end

    def usage(self, usage: Usage) -> bytes:
        """The last chunk: usage and no choices."""
        if not self._with_usage:
            return b""
        return self._start + b'],"usage":' + orjson.dumps(usage_json(usage)) + b"}\n\n"
