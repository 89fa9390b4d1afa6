"""What may come in: a submission, and the checks against model, memory, queue and deadline.

Pure; raises the error that the gateway is told. Making a request of it is `RequestBook`'s.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from infermesh.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest, QueueFull
from services.scheduler.bookings import Bookings
from services.scheduler.ledger import Capacity
from services.scheduler.pace import Pace
from services.scheduler.queue import WaitingQueue
from services.scheduler.sequence import Resumable, Sampling

# Estimates are off by some tenths. Under overload everybody who is let in comes close to the
# deadline: without a margin half of them would miss it, and what they were served be lost.
_CAUTION = 1.25


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
    # At other replicas, without a token since.
    num_crashes: int = 0
    resumable: Resumable | None = None

    @property
    def num_tokens(self) -> int:
        """What it brings to compute; the prompt once for all choices."""
        outputs = sum(len(output) + 1 for _, output in self.choices)
        return len(self.prompt_token_ids) + outputs - 1

    @property
    def key(self) -> int:
        """By which it is known again when it comes back."""
        return hash((self.priority, len(self.choices), self.max_tokens, *self.prompt_token_ids))

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
    submission: Submission,
    capacity: Capacity,
    queue: WaitingQueue,
    pace: Pace,
    bookings: Bookings,
    now_s: float,
) -> None:
    """Raises ContextLengthExceeded, QueueFull or DeadlineExceeded: not here, or not now.

    Without evidence of how fast waiting tokens leave, a deadline is believed. A resumed stream was
    promised: for it there is always room, and its deadline is believed.
    """
    prompt_len = len(submission.prompt_token_ids)
    if prompt_len + 1 > capacity.num_blocks * capacity.block_size:
        raise ContextLengthExceeded(
            f"the prompt has {prompt_len} tokens; this replica's KV memory holds "
            f"{capacity.num_blocks * capacity.block_size}, one of them for output",
            param="prompt",
        )
    if not submission.is_resumed:
        _check_room(submission, queue, pace, bookings, now_s)
    if submission.remaining_s is not None:
        wait_s = 0.0 if submission.is_resumed else _finish_s(submission, capacity, queue, pace)
        if submission.remaining_s <= 0 or wait_s > submission.remaining_s:
            raise DeadlineExceeded(
                f"an answer takes about {wait_s:.1f} s with the queue, the deadline is in "
                f"{submission.remaining_s:.1f} s"
            )
    if bookings:
        bookings.claim(submission.tenant, submission.key)


def _check_room(
    submission: Submission, queue: WaitingQueue, pace: Pace, bookings: Bookings, now_s: float
) -> None:
    tenant, num_tokens = submission.tenant, submission.num_tokens
    who = (submission.priority, tenant, submission.tenant_weight)
    reserved = 0
    if bookings:
        reserved = bookings.reserved(tenant, submission.key, now_s, pace.pause_s)
    excess = queue.excess(num_tokens, *who, reserved)
    if excess:
        rate = pace.drain_rate()
        mine = rate * queue.share_of(*who) if rate else None
        raise QueueFull(
            f"{queue.num_tokens} of {queue.max_tokens} queue tokens are taken, "
            f"{queue.num_tokens_of(tenant)} of them by this tenant",
            retry_after_s=bookings.book(tenant, submission.key, num_tokens, excess, mine, now_s),
        )


def _finish_s(submission: Submission, capacity: Capacity, queue: WaitingQueue, pace: Pace) -> float:
    """How long until its answer is complete; 0 where it need not wait or nothing is known."""
    num_ahead = queue.num_tokens_ahead(
        submission.priority, submission.tenant, submission.tenant_weight
    )
    wait_s = pace.seconds_for(num_ahead)
    if not wait_s:
        return 0.0
    per_step = pace.known_per_step or capacity.max_batch_tokens
    num_prompt_steps = -(-submission.num_tokens // per_step)
    answer_s = pace.service_s(num_prompt_steps, submission.min_tokens, submission.max_tokens)
    return _CAUTION * (wait_s + answer_s)
