"""A request, its choices, and each choice's time on the device. State and derived facts only.

A `Sequence` is one choice: its tokens live as long as the request. A `Placement` is its stay on the
device (slot, blocks, progress): it is made at admission and given up at finish, preemption, failure
or a break of the step stream; a sequence may have several, one after another.

    token_ids   [ prompt ............ | output ...... ]     known tokens
    positions     computed ──► planned ──► end              end = known + samples in flight
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from infermesh.block_hash import BlockHash, long_scope
from infermesh.errors import MeshError
from services.scheduler.fairness import Account
from services.scheduler.ids import BlockId, SlotId, StepId

_NO_STEP = StepId(0)


class FinishReason(enum.IntEnum):
    """Why a choice ended; the numbers are the wire's."""

    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    ERROR = 4


class MoveReason(enum.IntEnum):
    """Why a request had better go on elsewhere; the numbers are the wire's."""

    DRAINING = 1
    DEVICE_LOST = 2


@dataclass(frozen=True, slots=True)
class StopRule:
    """When a sequence ends by itself."""

    token_ids: frozenset[int]
    min_tokens: int
    # Prompt and output at most: the lower of max_tokens and the context length.
    max_len: int

    def verdict(self, token_ids: Seq[int], prompt_len: int) -> FinishReason | None:
        """Judges a sequence by its last token and its length."""
        length = len(token_ids)
        if token_ids[-1] in self.token_ids and length - prompt_len > self.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if length >= self.max_len else None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen: opaque here, passed on to the shard as it came."""

    wire: object
    needs_history: bool
    # That it names, in logit_bias.
    token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Resumable:
    """What another gateway must know to go on with a request that has an idempotency key.

    Attributes:
        key, digest: of the key and of what was asked for, as the gateway hashed them.
        record_id: of its usage record.
        attempt: the gateway's count.
        stop: the conditions as they came, opaque here.
    """

    key: bytes
    digest: bytes
    record_id: str
    attempt: int
    stop: object
    has_logprobs: bool


@dataclass(slots=True)
class Timeline:
    """When things happened to a sequence, in the scheduler's clock (seconds)."""

    arrived_s: float
    first_step_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_preemptions: int = 0
    num_replays: int = 0

    @property
    def is_at_first_token(self) -> bool:
        """The last token was the first of this attempt."""
        return self.first_token_s is not None and self.first_token_s == self.last_token_s


class Sink(Protocol):
    """Where a request's results go; never waits. The session's outbox, or a test's recorder."""

    def accepted(self, stream_id: int, queued_tokens: int) -> None: ...

    def refused(self, stream_id: int, error: MeshError) -> None: ...

    def delta(
        self, sequence: Sequence, start: int, tokens: Seq[int], logprobs: Seq[object]
    ) -> bool:
        """False where the reader is too slow: the request must end."""
        ...

    def finished(self, sequence: Sequence, end: Ending) -> None: ...

    def moved(self, request: Request, reason: MoveReason) -> None:
        """An offer: the request goes on here until it is cancelled."""
        ...

    def taken_over(self, request: Request) -> None:
        """The open request goes to another sink; this one hears no more of it."""

    def flush(self) -> None:
        """What was handed over since the last flush may go out, as one message."""
        ...


@dataclass(frozen=True, slots=True)
class Ending:
    """How a sequence ended."""

    reason: FinishReason
    error: MeshError | None = None
    stop_token_id: int | None = None


@dataclass(slots=True, eq=False)
class Request:
    """One submit."""

    request_id: str
    stream_id: int
    sink: Sink
    prompt_len: int
    sampling: Sampling
    stop: StopRule
    priority: int
    tenant: str
    tenant_weight: float
    scope: BlockHash
    # Order of arrival; ties in priority go by it.
    arrival: int
    deadline_s: float | None
    traceparent: str
    resumable: Resumable | None = None
    sequences: list[Sequence] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return all(sequence.is_over for sequence in self.sequences)

    @property
    def num_crashes(self) -> int:
        """The most of its open sequences."""
        return max((s.num_crashes for s in self.sequences if not s.is_over), default=0)


@dataclass(slots=True, eq=False)
class Placement:
    """One stay of a sequence on the device."""

    sequence: Sequence
    slot: SlotId
    block_ids: list[BlockId]
    num_planned: int
    num_computed: int
    # Rows in flight that will each yield a token.
    num_sampling: int = 0
    has_sampled: bool = False
    last_step: StepId = _NO_STEP
    # Number of its last row among all rows of the device: who has waited longest has the lowest.
    last_turn: int = 0
    # A step with a row of it has run: its blocks hold what it computed.
    has_run: bool = False
    # Its results are void: a block that it read was never filled.
    is_void: bool = False
    # Leading blocks whose hash was offered to the prefix cache.
    num_offered: int = 0
    # Published blocks whose filling step is in flight.
    unconfirmed: deque[tuple[StepId, BlockId]] = field(default_factory=deque)
    # Whose steps in flight it relies on, up to which step.
    relies_on: list[tuple[Placement, StepId]] = field(default_factory=list)

    @property
    def end(self) -> int:
        return len(self.sequence.token_ids) + self.num_sampling


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request."""

    request: Request
    choice: int
    token_ids: list[int]
    prompt_len: int
    priority: int
    # Orders sequences: the request's arrival, then the choice.
    order: tuple[int, int]
    max_len: int
    timeline: Timeline
    block_hashes: list[BlockHash] = field(default_factory=list)
    # It has outgrown the short rotary tables: its blocks and hashes are another kind's. Changes
    # only while it has no place.
    is_long: bool = False
    placement: Placement | None = None
    # Rows in flight, of its present and earlier placements.
    num_in_flight: int = 0
    is_over: bool = False
    # Tokens it counts for while it waits.
    queued_tokens: int = 0
    # Its tenant's in its class, from its first wait to its end.
    account: Account | None = None
    # Leading tokens that its tenant was charged for, or that were found in the cache.
    num_charged: int = 0
    # A running sequence computes this next block of ours: wait for it.
    waits_for: BlockHash | None = None
    # How many answers of a chat its prompt goes on from, as its first admission found.
    turn: int | None = None
    # Prompt tokens found in the cache at its first admission.
    cached_prompt_tokens: int | None = None
    # Breaks of the step stream while it was in an unanswered step, without a token since.
    num_crashes: int = 0
    # One per output token of this attempt; kept where another gateway may ask for them.
    logprobs: list[object] = field(default_factory=list)
    ending: Ending | None = None
    # Its part of the time of all steps that it was in, in microseconds; what was told of it.
    device_us: float = 0.0
    device_us_told: int = 0

    @property
    def scope(self) -> BlockHash:
        """What its first block follows."""
        scope = self.request.scope
        return long_scope(scope) if self.is_long else scope

    def parent_hash(self, index: int) -> BlockHash:
        """What its block number `index` follows; those before it are hashed."""
        return self.block_hashes[index - 1] if index else self.scope

    def turn_at(self, end: int) -> int:
        """How many answers of a chat are in its first `end` tokens."""
        return (self.turn or 0) + (end > self.prompt_len)

    def untold_device_us(self) -> int:
        """Device time since this was asked last, in whole microseconds."""
        due_us = int(self.device_us) - self.device_us_told
        self.device_us_told += due_us
        return due_us

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def output(self) -> list[int]:
        return self.token_ids[self.prompt_len :]
