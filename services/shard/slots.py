"""Per-slot state of the step stream and its rules: what a step means for the sequences in slots.

Owned by the worker thread. Knows neither a model nor a stream. A broken contract raises
ProtocolViolation, which ends the epoch; bad content of one sequence fails that sequence alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infermesh.errors import InvalidRequest, MeshError, ProtocolViolation
from services.shard.domain import (
    BlockId,
    Capacity,
    NewSequence,
    Row,
    RowOutcome,
    RowSource,
    RowStatus,
    Slot,
    Step,
)
from services.shard.history import TokenHistory
from services.shard.sampling_rules import sampling_fault


@dataclass(slots=True)
class SequenceState:
    """One sequence in a slot; changed by SlotTable only."""

    new: NewSequence
    position: int  # of the next query token = tokens whose KV is computed
    num_blocks: int
    history: TokenHistory | None
    last_token: int | None = None
    failure: MeshError | None = None
    failure_reported: bool = False


@dataclass(frozen=True, slots=True)
class ActiveRow:
    """A row to be run: its tokens start at `start`."""

    index: int  # in the step's rows
    sequence: SequenceState
    token_ids: Sequence[int]
    start: int
    sample: bool

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def context_len(self) -> int:
        """Tokens that the row's last token attends to, itself included."""
        return self.start + len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens before the one that this row samples."""
        return self.context_len - self.sequence.new.prompt_len


@dataclass(frozen=True, slots=True)
class AppliedStep:
    """A step ready to run: outcomes are already there for rows that must not run."""

    block_copies: Sequence[tuple[BlockId, BlockId]]
    active: Sequence[ActiveRow]
    outcomes: list[RowOutcome | None]


class SlotTable:
    """The sequences in all slots, and their block tables as one array."""

    def __init__(self, capacity: Capacity, max_model_len: int, vocab_size: int) -> None:
        self._capacity = capacity
        self._vocab_size = vocab_size
        # One spare column: a scheduler may reserve the block after the last position.
        width = -(-max_model_len // capacity.block_size) + 1
        self.block_tables: npt.NDArray[np.int64] = np.zeros(
            (capacity.max_num_seqs, width), dtype=np.int64
        )
        self._sequences: dict[Slot, SequenceState] = {}

    def reset(self) -> None:
        """Empties every slot, as a new epoch does."""
        self._sequences.clear()

    def get(self, slot: Slot) -> SequenceState | None:
        """The sequence in a slot."""
        return self._sequences.get(slot)

    def apply(self, step: Step) -> AppliedStep:
        """Applies everything that precedes the forward pass.

        Raises:
            ProtocolViolation: the step contradicts the state or the capacity; the epoch is over.
        """
        for slot in step.finished:
            self._check_slot(slot)
            self._sequences.pop(slot, None)
        for pair in step.block_copies:
            self._check_blocks(pair)
        for new in step.new_sequences:
            self._place(new)
        self._check_rows(step.rows)
        outcomes: list[RowOutcome | None] = []
        active: list[ActiveRow] = []
        for index, row in enumerate(step.rows):
            outcome = self._start(index, row, active)
            outcomes.append(outcome)
        return AppliedStep(step.block_copies, active, outcomes)

    def commit(self, row: ActiveRow, token: int | None) -> None:
        """The row has run: its tokens are computed, and `token` was sampled where it asked."""
        sequence = row.sequence
        sequence.position = row.context_len
        sequence.last_token = token
        if token is not None and sequence.history is not None:
            sequence.history.append(token)

    def fail(self, row: ActiveRow, error: MeshError) -> RowOutcome:
        """The row has failed: nothing is committed, and its slot is dead until acknowledged."""
        return _fail(row.sequence, error)

    def _place(self, new: NewSequence) -> None:
        self._check_slot(new.slot)
        self._check_blocks(new.block_ids)
        held = self._sequences.get(new.slot)
        if held is not None and held.failure is None:
            raise ProtocolViolation(f"slot {new.slot} holds a sequence that is not finished")
        covered = len(new.block_ids) * self._capacity.block_size
        if new.num_computed_tokens > covered:
            raise ProtocolViolation(
                f"slot {new.slot}: num_computed_tokens is {new.num_computed_tokens}, "
                f"its blocks hold {covered}"
            )
        if 0 < len(new.penalty_token_ids) < new.prompt_len:
            raise ProtocolViolation(
                f"slot {new.slot}: penalty_token_ids has {len(new.penalty_token_ids)} tokens, "
                f"fewer than prompt_len {new.prompt_len}"
            )
        failure = sampling_fault(new, self._vocab_size)
        history = None
        if failure is None and new.sampling.penalizes:
            ids = new.penalty_token_ids
            history = TokenHistory(ids[: new.prompt_len], ids[new.prompt_len :])
        state = SequenceState(new, new.num_computed_tokens, 0, history, failure=failure)
        self._sequences[new.slot] = state
        self._append_blocks(state, new.block_ids)

    def _check_rows(self, rows: Sequence[Row]) -> None:
        if len({row.slot for row in rows}) < len(rows):
            raise ProtocolViolation("a step has two rows of one slot")
        num_tokens = sum(row.num_tokens for row in rows)
        if num_tokens > self._capacity.max_batch_tokens:
            raise ProtocolViolation(
                f"a step has {num_tokens} tokens, allowed are {self._capacity.max_batch_tokens}"
            )

    def _start(self, index: int, row: Row, active: list[ActiveRow]) -> RowOutcome | None:
        """Appends the row to `active`, or answers it at once where it must not run."""
        self._check_slot(row.slot)
        sequence = self._sequences.get(row.slot)
        if sequence is None:
            raise ProtocolViolation(f"a row of slot {row.slot}, which holds no sequence")
        if sequence.failure is not None:
            if sequence.failure_reported:
                return RowOutcome(row.slot, RowStatus.SKIPPED)
            return _fail(sequence, sequence.failure)
        self._append_blocks(sequence, row.new_block_ids)
        self._check_place(row, sequence)
        tokens = _tokens(row, sequence)
        if min(tokens) < 0 or max(tokens) >= self._vocab_size:
            return _fail(
                sequence,
                InvalidRequest(f"a token id is outside the vocabulary of {self._vocab_size}"),
            )
        active.append(ActiveRow(index, sequence, tokens, sequence.position, row.sample))
        return None

    def _check_place(self, row: Row, sequence: SequenceState) -> None:
        end = sequence.position + row.num_tokens
        if end > sequence.num_blocks * self._capacity.block_size:
            raise ProtocolViolation(
                f"slot {row.slot}: position {end - 1} is past its {sequence.num_blocks} blocks"
            )
        if row.sample and end < sequence.new.prompt_len:
            raise ProtocolViolation(
                f"slot {row.slot}: sampling at {end}, inside the prompt of "
                f"{sequence.new.prompt_len} tokens"
            )

    def _append_blocks(self, sequence: SequenceState, block_ids: Sequence[BlockId]) -> None:
        if not block_ids:
            return
        self._check_blocks(block_ids)
        start, end = sequence.num_blocks, sequence.num_blocks + len(block_ids)
        slot = sequence.new.slot
        if end > self.block_tables.shape[1]:
            raise ProtocolViolation(
                f"slot {slot}: {end} blocks, a sequence has at most {self.block_tables.shape[1]}"
            )
        self.block_tables[slot, start:end] = block_ids
        sequence.num_blocks = end

    def _check_slot(self, slot: Slot) -> None:
        if not 0 <= slot < self._capacity.max_num_seqs:
            raise ProtocolViolation(
                f"slot is {slot}, allowed are 0 to {self._capacity.max_num_seqs - 1}"
            )

    def _check_blocks(self, block_ids: Sequence[BlockId]) -> None:
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self._capacity.num_blocks:
            raise ProtocolViolation(f"a block id is outside 0 to {self._capacity.num_blocks - 1}")


def _fail(sequence: SequenceState, error: MeshError) -> RowOutcome:
    sequence.failure = error
    sequence.failure_reported = True
    return RowOutcome(sequence.new.slot, RowStatus.FAILED, error=error)


def _tokens(row: Row, sequence: SequenceState) -> Sequence[int]:
    if row.source is RowSource.LAST:
        if row.num_tokens != 1:
            raise ProtocolViolation(
                f"slot {row.slot}: a row from LAST has num_tokens {row.num_tokens}, not 1"
            )
        if sequence.last_token is None:
            raise ProtocolViolation(f"slot {row.slot}: LAST, but its last row sampled nothing")
        return (sequence.last_token,)
    if row.num_tokens < 1 or len(row.token_ids) != row.num_tokens:
        raise ProtocolViolation(
            f"slot {row.slot}: num_tokens is {row.num_tokens}, token_ids has {len(row.token_ids)}"
        )
    return row.token_ids
