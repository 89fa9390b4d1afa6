"""What a model produced: tokens, logprobs, ends of choices, and their text. Values only."""

import enum
from dataclasses import dataclass


class FinishReason(enum.Enum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One output token's logprob, and the likeliest tokens (id, logprob), likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceTimings:
    """Where one choice's time went in its replica, in seconds."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_preemptions: int = 0
    num_replays: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    """A choice's first token as the scheduler reports it; no time is in `decode_s` yet."""

    timings: ChoiceTimings
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of one choice as the scheduler reports it."""

    reason: FinishReason
    stop_token_id: int | None = None
    timings: ChoiceTimings = ChoiceTimings()
    cached_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TopEntry:
    """One of the likeliest tokens at a position."""

    token_id: int
    token: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class LogprobEntry:
    """One output token with its bytes and the characters of output before it."""

    token_id: int
    token: bytes
    text_offset: int
    logprob: float
    top: tuple[TopEntry, ...]


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """New text of one choice; `finish_reason` is set in its last."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[LogprobEntry, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost; its share of the device's time is in microseconds."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0
    device_us: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_prompt_tokens + other.cached_prompt_tokens,
            self.device_us + other.device_us,
        )
