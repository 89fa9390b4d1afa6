"""What may come in: a submission, and the checks against model, memory, queue and deadline.

Pure; raises the error that the gateway is told. Making a request of it is `RequestBook`'s.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from infermesh.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest, QueueFull
from services.scheduler.ledger import Capacity
from services.scheduler.queue import Throughput, WaitingQueue
from services.scheduler.sequence import Sampling


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the scheduler must know of the model it serves."""

    model_id: str
    fingerprint: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    # Sequences of more tokens use other rotary tables; 0: one for all lengths.
    rope_switch_len: int = 0


@dataclass(frozen=True, slots=True)
class Submission:
    """A submit as the gateway sent it, translated."""

    request_id: str
    stream_id: int
    prompt_token_ids: list[int]
    # Choice index and what was delivered of it before.
    choices: list[tuple[int, list[int]]]
    sampling: Sampling
    max_tokens: int | None
    min_tokens: int
    stop_token_ids: frozenset[int]
    ignore_eos: bool
    priority: int
    tenant: str
    tenant_weight: float
    remaining_s: float | None
    sharing_domain: str
    traceparent: str

    @property
    def num_tokens(self) -> int:
        """What it brings to compute; the prompt once for all choices."""
        outputs = sum(len(output) + 1 for _, output in self.choices)
        return len(self.prompt_token_ids) + outputs - 1

    @property
    def is_resumed(self) -> bool:
        """Its client has seen some of it already."""
        return any(output for _, output in self.choices)


def check_input(submission: Submission, model: ModelFacts) -> None:
    """Raises InvalidRequest or ContextLengthExceeded, naming field, value and range."""
    prompt_len, vocab_size = len(submission.prompt_token_ids), model.vocab_size
    if prompt_len == 0:
        raise InvalidRequest("prompt_token_ids is empty: at least one token", param="prompt")
    if prompt_len >= model.max_model_len:
        raise ContextLengthExceeded(
            f"the prompt has {prompt_len} tokens; the model's context of {model.max_model_len} "
            "tokens must also hold at least one output token",
            param="prompt",
        )
    if not submission.choices:
        raise InvalidRequest("choices is empty: at least one choice", param="n")
    indices = [index for index, _ in submission.choices]
    if len(set(indices)) < len(indices):
        twice = next(index for index in indices if indices.count(index) > 1)
        raise InvalidRequest(f"choices names index {twice} twice", param="n")
    named: list[tuple[str, Collection[int]]] = [
        ("prompt", submission.prompt_token_ids),
        ("stop_token_ids", submission.stop_token_ids),
        ("logit_bias", submission.sampling.token_ids),
        *(("choices", output) for _, output in submission.choices),
    ]
    for param, token_ids in named:  # one such id could bring the device down
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
            wrong = next(one for one in token_ids if not 0 <= one < vocab_size)
            raise InvalidRequest(
                f"{param} has token id {wrong}; the vocabulary has 0 to {vocab_size - 1}",
                param=param,
            )
    limits = {"min_tokens": submission.min_tokens, "max_tokens": submission.max_tokens or 0}
    for param, value in limits.items():
        if value < 0:
            raise InvalidRequest(f"{param} is {value}: 0 or more", param=param)


def check_load(
    submission: Submission, capacity: Capacity, queue: WaitingQueue, drain: Throughput
) -> None:
    """Raises ContextLengthExceeded, QueueFull or DeadlineExceeded: not here, or not now.

    Without evidence of how fast waiting tokens are computed, a deadline is believed; for a resumed
    stream, which was promised, always.
    """
    prompt_len = len(submission.prompt_token_ids)
    if prompt_len + 1 > capacity.num_blocks * capacity.block_size:
        raise ContextLengthExceeded(
            f"the prompt has {prompt_len} tokens; this replica's KV memory holds "
            f"{capacity.num_blocks * capacity.block_size}, one of them for output",
            param="prompt",
        )
    if not queue.has_room(submission.num_tokens):
        excess = queue.num_tokens + submission.num_tokens - queue.max_tokens
        raise QueueFull(
            f"{queue.num_tokens} of {queue.max_tokens} queue tokens are taken",
            retry_after_s=drain.retry_after_s(excess),
        )
    if submission.remaining_s is not None:
        num_ahead = queue.num_tokens_ahead(submission.priority)
        wait_s = 0.0 if submission.is_resumed else drain.seconds_for(num_ahead) or 0.0
        if submission.remaining_s <= 0 or wait_s > submission.remaining_s:
            raise DeadlineExceeded(
                f"the queue takes about {wait_s:.1f} s, the deadline is in "
                f"{submission.remaining_s:.1f} s"
            )
