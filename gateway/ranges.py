"""What every number of a request may be: one table for both edges, and its refusals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.request import Attribution, Options
from infermesh.errors import InvalidRequest

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_USER_CHARS = 256
# As OpenAI's `metadata` has them.
MAX_LABELS = 16
MAX_LABEL_NAME_CHARS = 64
MAX_LABEL_VALUE_CHARS = 512


@dataclass(frozen=True, slots=True)
class Range:
    """Allowed values, ends included unless said otherwise."""

    low: float
    high: float
    low_excluded: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.low_excluded else value >= self.low
        return above and value <= self.high  # NaN fails both

    def __str__(self) -> str:
        if self.low_excluded:
            return f"above {self.low:g} and at most {self.high:g}"
        if math.isinf(self.high):
            return f"at least {self.low:g}"
        return f"between {self.low:g} and {self.high:g}"


_INT32_MAX = float(2**31 - 1)
RANGES = {
    "temperature": Range(0, 2),
    "top_p": Range(0, 1, low_excluded=True),
    "top_k": Range(0, _INT32_MAX),
    "min_p": Range(0, 1),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "repetition_penalty": Range(0, 10, low_excluded=True),
    "top_logprobs": Range(0, 20),
    "max_tokens": Range(1, _INT32_MAX),
    "min_tokens": Range(0, _INT32_MAX),
    "n": Range(1, 128),
    # any 64-bit integer: signed as OpenAI's clients send it
    "seed": Range(float(-(2**63)), float(2**64)),
}
_BIAS = Range(-100, 100)


def check_value(name: str, value: float | None, limits: Range | None = None) -> None:
    """Raises InvalidRequest, naming field, value and range, where `value` is outside."""
    allowed = limits or RANGES[name]
    if value is not None and not allowed.holds(value):
        raise InvalidRequest(f"{name} is {value}; it must be {allowed}", param=name)


def check(options: Options) -> None:
    """Raises InvalidRequest for the first value out of range."""
    sampling, stop = options.sampling, options.stop
    for name in (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "seed",
        "top_logprobs",
    ):
        check_value(name, getattr(sampling, name))
    check_value("n", options.n)
    check_value("max_tokens", stop.max_tokens)
    check_value("min_tokens", stop.min_tokens)
    if stop.max_tokens is not None and stop.min_tokens > stop.max_tokens:
        check_value("min_tokens", stop.min_tokens, Range(0, stop.max_tokens))
    _check_count("logit_bias", sampling.logit_bias, MAX_LOGIT_BIAS)
    for token_id, bias in sampling.logit_bias.items():
        if not _BIAS.holds(bias):
            raise InvalidRequest(
                f"logit_bias of token {token_id} is {bias}; it must be {_BIAS}", param="logit_bias"
            )
    _check_count("stop_token_ids", stop.stop_token_ids, MAX_STOP_TOKEN_IDS)
    _check_stop_strings(options.stop_strings)
    check_attribution(options.attribution)
    _check_text("user", "user", options.user, 0, MAX_USER_CHARS)


def check_attribution(attribution: Attribution) -> None:
    """Raises InvalidRequest for what the ledger could not keep as it is."""
    _check_text("user", "user", attribution.end_user, 0, MAX_USER_CHARS)
    labels = attribution.labels
    _check_count("metadata", labels, MAX_LABELS)
    for name, value in labels.items():
        _check_text("metadata", "metadata has a name that", name, 1, MAX_LABEL_NAME_CHARS)
        what = f"metadata.{name}"
        _check_text("metadata", what, value, 0, MAX_LABEL_VALUE_CHARS)


def _check_text(param: str, what: str, text: str, least: int, most: int) -> None:
    if not least <= len(text) <= most:
        raise InvalidRequest(
            f"{what} has {len(text)} characters; {least} to {most} are allowed", param=param
        )
    if "\0" in text or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
        raise InvalidRequest(f"{what} has a character that can't be stored", param=param)


def check_token_ids(param: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequest for an id that the model has no row for."""
    if not token_ids:
        return
    lowest, highest = min(token_ids), max(token_ids)
    if lowest < 0 or highest >= vocab_size:
        raise InvalidRequest(
            f"{param} has token id {lowest if lowest < 0 else highest}; ids of this model are "
            f"between 0 and {vocab_size - 1}",
            param=param,
        )


def _check_count(param: str, values: object, most: int) -> None:
    count = len(values)  # type: ignore[arg-type]  # a sequence or a mapping
    if count > most:
        raise InvalidRequest(
            f"{param} has {count} entries; at most {most} are allowed", param=param
        )


def _check_stop_strings(stops: Sequence[str]) -> None:
    _check_count("stop", stops, MAX_STOP_STRINGS)
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_STRING_CHARS:
            raise InvalidRequest(
                f"stop has a string of {len(stop)} characters; each must have between 1 and "
                f"{MAX_STOP_STRING_CHARS}",
                param="stop",
            )
