"""What names a request to every gateway: tenant and idempotency key, and a digest of its body.

Pure but for the clock that dates the name of its usage record.
"""

import hashlib
import json
import struct
import time
from collections.abc import Mapping
from typing import Any

from gateway.request import Conversation, GenerationRequest, Prompt, Resumable
from infermesh.errors import InvalidRequest, UnsupportedParameter

MAX_KEY_CHARS = 255


def check_key(key: str | None, param: str) -> str:
    """The client's key; empty where there is none.

    Raises:
        InvalidRequest: it is empty, too long, or has characters that can't be shown.
    """
    if key is None:
        return ""
    if not (1 <= len(key) <= MAX_KEY_CHARS and key.isprintable()):
        raise InvalidRequest(
            f"{param} has {len(key)} characters; it must have 1 to {MAX_KEY_CHARS}, all printable",
            param=param,
        )
    return key


def positions(given: str | None, key: str, n: int, param: str) -> tuple[int, ...]:
    """Tokens of each choice that the client has: `12`, or `12,7` of two; all 0 where none is given.

    Raises:
        InvalidRequest: they are no such numbers, or there is no key to resume by.
    """
    if given is None:
        return (0,) * n
    if not key:
        raise InvalidRequest(f"{param} needs an Idempotency-Key to resume by", param=param)
    parts = [part.strip() for part in given.split(",")]
    if len(parts) != n or not all(p.isascii() and p.isdigit() and len(p) < 10 for p in parts):
        raise InvalidRequest(
            f"{param} is {given[:60]!r}; it must be the number of tokens that were received, of "
            f"each of the {n} choices, separated by commas",
            param=param,
        )
    return tuple(map(int, parts))


def resumable(
    tenant: str, key: str, request: GenerationRequest, model_id: str, window_s: float
) -> Resumable | None:
    """What names a request to every gateway; None for one without a key.

    The usage record's name is the same for all who begin the request within one window, so that
    gateways which do so at once are counted once; it differs after, when the key means another
    computation.

    Raises:
        UnsupportedParameter: several prompts under one key.
    """
    if not key:
        return None
    if len(request.prompts) > 1:
        raise UnsupportedParameter(
            f"prompt has {len(request.prompts)} entries; with an Idempotency-Key it must have one",
            param="prompt",
        )
    hashed = hashlib.sha256(_framed(tenant) + _framed(key)).digest()
    window = int(time.time() / window_s).to_bytes(8, "little")
    digest = body_digest(request, model_id)
    record_id = hashlib.sha256(b"usage" + hashed + digest + window).hexdigest()[:32]
    return Resumable(hashed, digest, record_id)


def body_digest(request: GenerationRequest, model_id: str) -> bytes:
    """Equal for requests that ask for the same answer, over HTTP or gRPC, streamed or not."""
    options = request.options
    sampling, stop = options.sampling, options.stop
    limit = options.fallback_max_tokens if stop.max_tokens is None else stop.max_tokens
    facts = {
        "model": model_id,
        "prompts": [_shown(prompt) for prompt in request.prompts],
        "n": options.n,
        "user": options.user,
        "temperature": _single(sampling.temperature),
        "top_p": _single(sampling.top_p),
        "top_k": sampling.top_k,
        "min_p": _single(sampling.min_p),
        "presence_penalty": _single(sampling.presence_penalty),
        "frequency_penalty": _single(sampling.frequency_penalty),
        "repetition_penalty": _single(sampling.repetition_penalty),
        "logit_bias": sorted((i, _single(v)) for i, v in sampling.logit_bias.items()),
        "seed": sampling.seed,
        "logprobs": sampling.top_logprobs,
        "max_tokens": limit,
        "min_tokens": stop.min_tokens,
        "stop_token_ids": sorted(stop.stop_token_ids),
        "ignore_eos": stop.ignore_eos,
        "stop": sorted(options.stop_strings),
    }
    # ASCII escapes keep text that no UTF-8 could hold
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).digest()


def _framed(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(8, "little") + data


def _shown(prompt: Prompt) -> Any:
    if not isinstance(prompt, Conversation):
        return prompt
    messages = [_given(message) for message in prompt.messages]
    return {"messages": messages, "template_kwargs": dict(prompt.template_kwargs)}


def _given(message: Mapping[str, Any]) -> dict[str, Any]:
    """Null means absent."""
    return {name: value for name, value in message.items() if value is not None}


def _single(value: float | None) -> float | None:
    """As gRPC carries it."""
    if value is None:
        return None
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded
