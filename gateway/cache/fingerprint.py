"""Canonical fingerprints of a request: which others have the same answer, which may have. Pure.

Exact: the whole request. Compatibility: the same with only the last user text blanked, so that two
requests with equal ones differ in nothing but that text.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.request import Conversation, Job, Options, Prompt

# Raised whenever the canonical form changes: older entries are then never found.
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """SHA-256 of both canonical forms, and the text that tells them apart.

    Attributes:
        text: the last user text; empty where nothing was blanked, which closes the semantic tier.
    """

    exact: bytes
    compatibility: bytes
    text: str


@dataclass(frozen=True, slots=True)
class Subject:
    """Everything that decides an answer.

    Attributes:
        job: the resolved request; its sampling has the model's defaults filled in.
        options: as the client gave them.
        max_model_len: ends answers of clients that set no limit.
        embedder_id: whose idea of similarity the semantic tier follows.
        adapter_id: empty for the model alone.
    """

    job: Job
    prompt: Prompt
    options: Options
    max_model_len: int
    embedder_id: str
    adapter_id: str = ""


def fingerprints(subject: Subject, render: Callable[[Conversation], str | None]) -> Fingerprints:
    """Both fingerprints.

    Args:
        render: a conversation through the model's template, which may add what no message says;
            None where the template refuses it.
    """
    blank, text = _blank(subject.prompt)
    rendered = None if blank is None else render(blank)
    facts = _facts(subject)
    ids = array("q", subject.job.prompt_token_ids).tobytes()
    if blank is None or rendered is None:
        text, compatibility = "", _digest({**facts, "prompt": None}, ids)
    else:
        shown = {"messages": list(blank.messages), "template_kwargs": blank.template_kwargs}
        compatibility = _digest({**facts, "prompt": shown, "rendered": rendered}, b"")
    # resolved, because it depends on the prompt's length where the client set none
    exact = _digest({**facts, "max_tokens": subject.job.stop.max_tokens}, ids)
    return Fingerprints(exact, compatibility, text)


def _blank(prompt: Prompt) -> tuple[Conversation | None, str]:
    """The conversation without its last user text, and that text; None where there is none."""
    if not isinstance(prompt, Conversation):
        return None, ""
    *before, last = prompt.messages
    text = last.get("content")
    if last.get("role") != "user" or not isinstance(text, str) or not text.strip():
        return None, ""
    return Conversation((*before, {**last, "content": ""}), prompt.template_kwargs), text


def _facts(subject: Subject) -> dict[str, Any]:
    job, options = subject.job, subject.options
    sampling = job.sampling
    return {
        "version": _VERSION,
        "model": job.fingerprint,
        "max_model_len": subject.max_model_len,
        "adapter": subject.adapter_id,
        "sharing_domain": job.sharing_domain,
        "embedder": subject.embedder_id,
        "n": job.num_choices,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "logit_bias": sorted(sampling.logit_bias.items()),
        # the client's own; a drawn one makes no request unlike another
        "seed": job.shareable_seed,
        "logprobs": sampling.top_logprobs,
        "asked_max_tokens": options.stop.max_tokens,
        "fallback_max_tokens": options.fallback_max_tokens,
        "min_tokens": options.stop.min_tokens,
        "stop_token_ids": sorted(options.stop.stop_token_ids),
        "ignore_eos": options.stop.ignore_eos,
        "stop": sorted(options.stop_strings),
    }


def _digest(facts: Mapping[str, Any], token_ids: bytes) -> bytes:
    # ASCII escapes keep text that no UTF-8 could hold
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(len(canonical).to_bytes(8, "little"))
    digest.update(canonical.encode("ascii"))
    digest.update(token_ids)
    return digest.digest()
