"""A shard whose "model" can tell when the scheduler is wrong, and nothing else.

Its KV memory holds, per position, the token, the position and a hash of the whole history. Before a
token is sampled the history is read back through the block table, so a wrong block, a stale one, a
wrong position or a block reused too early shows as a `Breach`. It also enforces the rules of the
step stream in shard_service.proto. What it samples is `model_of_tokens`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from infermesh.v1 import shard_service_pb2
from infermesh.v1.errors_pb2 import ERROR_REASON_NUMERICAL_ERROR, ErrorDetail
from tests.model_of_tokens import LONG, SHORT, chain, sample, uses_penalties

pb = shard_service_pb2
# What a failed row leaves where it should have written, and what is made of reading that.
TAINT = (-2, -2, -2)


class Breach(AssertionError):
    """The scheduler broke a rule of the step stream."""


class DeviceFault(Exception):
    """A step failed as a whole; the epoch is over."""


@dataclass
class Slot:
    """State of one sequence on the shard."""

    spec: shard_service_pb2.NewSequence
    blocks: list[int]
    num_computed: int
    history: list[int]
    # Hash of `history`.
    state: int
    last: int | None = None
    has_failed: bool = False
    # It read what a failed row left behind: whatever it yields is garbage.
    is_tainted: bool = False


@dataclass
class ModelShard:
    """Takes steps into a queue with `receive`, runs the oldest with `execute`."""

    num_blocks: int = 64
    block_size: int = 4
    max_num_seqs: int = 8
    max_batch_tokens: int = 16
    window: int = 2
    # As ModelManifest's.
    rope_switch_len: int = 0
    packs_rows: bool = True
    incarnation: int = 1
    epoch: int = 0
    num_steps_executed: int = 0
    # Slots whose next row is to fail, and prompts that break the device whenever they run.
    failing_slots: set[int] = field(default_factory=set)
    poison_token: int | None = None
    # Microseconds that it says a step with rows of so many query tokens took.
    step_us: Callable[[list[int]], float] = lambda num_tokens: 10

    def __post_init__(self) -> None:
        self.kv: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.slots: dict[int, Slot] = {}
        self.queue: deque[shard_service_pb2.StepRequest] = deque()
        self._next_received = 1
        # Tables and positions as of the last received step.
        self._tables: dict[int, list[int]] = {}
        self._positions: dict[int, int] = {}
        # Of each unanswered step: the blocks that it touches, the cells that it writes.
        self._touched: deque[set[int]] = deque()
        self._writes: deque[set[tuple[int, int]]] = deque()
        self.max_step_bytes = 0
        # Rows that came as slots alone.
        self.num_decodes = 0

    @property
    def capacity(self) -> shard_service_pb2.ShardCapacity:
        return pb.ShardCapacity(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_batch_tokens=self.max_batch_tokens,
        )

    def open(self, epoch: int) -> None:
        if epoch <= self.epoch:
            raise Breach(f"epoch {epoch} after {self.epoch}")
        self.epoch = epoch
        self.end_epoch()

    def end_epoch(self) -> None:
        """Unanswered steps are gone; what they were to write may be torn."""
        for cell in set().union(*self._writes):
            self.kv[cell] = (-1, -1, -1)
        self.queue.clear()
        self._touched.clear()
        self._writes.clear()
        self.slots.clear()
        self._tables.clear()
        self._positions.clear()
        self._next_received = 1

    def crash(self) -> None:
        """The process died and came back with empty memory."""
        self.end_epoch()
        self.kv.clear()
        self.incarnation += 1
        self.epoch = 0

    def receive(self, data: bytes | shard_service_pb2.StepRequest) -> None:
        """Checks what can be checked before a step runs."""
        step = pb.StepRequest()
        step.MergeFrom(pb.StepRequest.FromString(data) if isinstance(data, bytes) else data)
        self.max_step_bytes = max(self.max_step_bytes, step.ByteSize())
        _must(self.packs_rows or not step.decodes, "rows are packed for one that can't read them")
        self.num_decodes += len(step.decodes)
        others = list(step.rows)  # decodes come first
        del step.rows[:]
        step.rows.extend(
            pb.Row(slot=slot, num_tokens=1, source=pb.ROW_SOURCE_LAST, sample=True)
            for slot in step.decodes
        )
        step.rows.extend(others)
        _must(step.epoch == self.epoch, f"step of epoch {step.epoch} in {self.epoch}")
        _must(step.step_id == self._next_received, "step ids are not contiguous")
        _must(len(self.queue) < self.window, "more steps in flight than the window")
        _must(len(step.rows) > 0, "a step without rows")
        _must(sum(r.num_tokens for r in step.rows) <= self.max_batch_tokens, "over the budget")
        self._next_received += 1
        touched: set[int] = set()
        writes: set[tuple[int, int]] = set()
        for slot in step.finished:
            _must(slot in self._tables, f"slot {slot} finished but empty")
            del self._tables[slot]
        for copy in step.block_copies:
            self._must_be_fresh(copy.destination)
            touched.update((copy.source, copy.destination))
            writes.update((copy.destination, offset) for offset in range(self.block_size))
        copied = {copy.destination for copy in step.block_copies}
        for new in step.new_sequences:
            self._receive_new(new, copied)
        _must(len({r.slot for r in step.rows}) == len(step.rows), "two rows for one slot")
        for row in step.rows:
            self._receive_row(row, touched, writes)
        self.queue.append(step)
        self._touched.append(touched)
        self._writes.append(writes)

    def execute(self) -> shard_service_pb2.StepResult:
        """Runs the oldest queued step; call `delivered` once the scheduler has the result."""
        step = self.queue.popleft()
        for slot in step.finished:
            del self.slots[slot]
        for copy in step.block_copies:
            for offset in range(self.block_size):
                cell = self.kv.get((copy.source, offset))
                self.kv.pop((copy.destination, offset), None)
                if cell is not None:
                    self.kv[copy.destination, offset] = cell
        for new in step.new_sequences:
            self._start(new)
        before = dict(self.kv)
        rows = [self._run(row, before) for row in step.rows]
        self.num_steps_executed += 1
        decoded: list[int] = []
        while len(decoded) < len(step.decodes) and rows[0].status == pb.ROW_STATUS_OK:
            decoded += rows.pop(0).token_ids
        return pb.StepResult(
            epoch=self.epoch,
            step_id=step.step_id,
            decoded=decoded,
            rows=rows,
            timings=pb.StepTimings(
                execute_us=round(self.step_us([row.num_tokens for row in step.rows]))
            ),
        )

    def delivered(self) -> None:
        """The scheduler knows that the oldest unanswered step ran."""
        self._touched.popleft()
        self._writes.popleft()

    def _receive_new(self, new: shard_service_pb2.NewSequence, copied: set[int]) -> None:
        _must(new.slot < self.max_num_seqs, f"slot {new.slot} does not exist")
        _must(new.slot not in self._tables, f"slot {new.slot} is taken")
        _must(new.sampling.HasField("seed"), "the seed is not resolved")
        _must(new.sampling.HasField("temperature"), "the temperature is not resolved")
        _must(len(set(new.block_ids)) == len(new.block_ids), "a block twice in one table")
        covered = -(-new.num_computed_tokens // self.block_size)
        _must(len(new.block_ids) >= covered, "the table does not cover what is computed")
        for block in new.block_ids[covered:]:
            self._must_be_fresh(block)
        partial = new.num_computed_tokens % self.block_size
        if partial:  # it will be written to: nobody else may hold it
            last = new.block_ids[covered - 1]
            if last not in copied:
                self._must_be_fresh(last)
        self._tables[new.slot] = list(new.block_ids)
        self._positions[new.slot] = new.num_computed_tokens

    def _receive_row(
        self, row: shard_service_pb2.Row, touched: set[int], writes: set[tuple[int, int]]
    ) -> None:
        _must(row.slot in self._tables, f"a row for empty slot {row.slot}")
        _must(row.num_tokens > 0, "a row without tokens")
        if row.source == pb.ROW_SOURCE_LITERAL:
            _must(len(row.token_ids) == row.num_tokens, "literal tokens are missing")
        else:
            _must(row.source == pb.ROW_SOURCE_LAST, "a row without source")
            _must(row.num_tokens == 1 and not row.token_ids, "LAST is one token")
            _must(row.sample, "LAST is always the end of the known tokens")
        for block in row.new_block_ids:
            self._must_be_fresh(block)
            self._tables[row.slot].append(block)
        touched.update(self._tables[row.slot])
        start = self._positions[row.slot]
        self._positions[row.slot] = start + row.num_tokens
        for position in range(start, start + row.num_tokens):
            index, offset = divmod(position, self.block_size)
            _must(index < len(self._tables[row.slot]), f"no block for position {position}")
            writes.add((self._tables[row.slot][index], offset))

    def _must_be_fresh(self, block: int) -> None:
        _must(block < self.num_blocks, f"block {block} does not exist")
        for slot, table in self._tables.items():
            _must(block not in table, f"block {block} is in use by slot {slot}")
        for touched in self._touched:
            _must(block not in touched, f"block {block} is touched by a step in flight")

    def _start(self, new: shard_service_pb2.NewSequence) -> None:
        history: list[int] = []
        state = LONG if new.long_rope else SHORT
        for position in range(new.num_computed_tokens):
            block = new.block_ids[position // self.block_size]
            cell = self.kv.get((block, position % self.block_size))
            _must(cell is not None, f"position {position} of block {block} was never computed")
            if cell == TAINT:
                self._start_tainted(new)
                return
            token_id, at, recorded = cell
            state = chain(state, token_id)
            _must(at == position, f"block {block} holds position {at}, not {position}")
            _must(recorded == state, f"block {block} belongs to another history")
            history.append(token_id)
        self.slots[new.slot] = Slot(
            new, list(new.block_ids), new.num_computed_tokens, history, state
        )

    def _start_tainted(self, new: shard_service_pb2.NewSequence) -> None:
        history = [0] * new.num_computed_tokens
        slot = Slot(new, list(new.block_ids), new.num_computed_tokens, history, 0)
        slot.is_tainted = True
        self.slots[new.slot] = slot

    def _run(self, row: shard_service_pb2.Row, before: dict) -> shard_service_pb2.RowResult:
        slot = self.slots[row.slot]
        slot.blocks.extend(row.new_block_ids)
        if slot.has_failed:
            self._taint(slot, row.num_tokens)
            return pb.RowResult(slot=row.slot, status=pb.ROW_STATUS_SKIPPED)
        if row.slot in self.failing_slots:
            self.failing_slots.discard(row.slot)
            slot.has_failed = True
            self._taint(slot, row.num_tokens)
            error = ErrorDetail(reason=ERROR_REASON_NUMERICAL_ERROR, message="not a number")
            return pb.RowResult(slot=row.slot, status=pb.ROW_STATUS_FAILED, error=error)
        token_ids = list(row.token_ids)
        if row.source == pb.ROW_SOURCE_LAST:
            _must(slot.last is not None, "LAST before anything was sampled")
            token_ids = [slot.last]
        if self.poison_token in token_ids:
            raise DeviceFault("poison")
        if not slot.is_tainted:
            self._read(slot, before)
        if slot.is_tainted:
            self._taint(slot, row.num_tokens)
            sampled = [0] if row.sample else []
        else:
            for token_id in token_ids:
                self._write(row.slot, slot, token_id)
            sampled = [self._sample(slot)] if row.sample else []
        if sampled:
            slot.last = sampled[0]
        return pb.RowResult(slot=row.slot, status=pb.ROW_STATUS_OK, token_ids=sampled)

    def _read(self, slot: Slot, before: dict) -> None:
        """Everything that attention would read, as it was before this step."""
        state = LONG if slot.spec.long_rope else SHORT
        for position in range(slot.num_computed):
            block = slot.blocks[position // self.block_size]
            cell = before.get((block, position % self.block_size))
            _must(cell is not None, f"reads position {position} of block {block}: nothing there")
            if cell == TAINT:
                slot.is_tainted = True
                return
            state = chain(state, slot.history[position])
            _must(cell == (slot.history[position], position, state), f"reads a foreign {cell}")

    def _taint(self, slot: Slot, count: int) -> None:
        for position in range(slot.num_computed, slot.num_computed + count):
            index, offset = divmod(position, self.block_size)
            self.kv[slot.blocks[index], offset] = TAINT
        slot.history += [0] * count
        slot.num_computed += count

    def _write(self, number: int, slot: Slot, token_id: int) -> None:
        position = slot.num_computed
        index, offset = divmod(position, self.block_size)
        _must(index < len(slot.blocks), f"no block for position {position}")
        block = slot.blocks[index]
        for other_number, other in self.slots.items():
            if other_number != number:
                _must(block not in other.blocks, f"slots {number}, {other_number} share a write")
        slot.history.append(token_id)
        slot.state = chain(slot.state, token_id)
        self.kv[block, offset] = (token_id, position, slot.state)
        slot.num_computed += 1
        if self.rope_switch_len and not slot.spec.long_rope:
            _must(slot.num_computed <= self.rope_switch_len, f"slot {number} has become long")

    def _sample(self, slot: Slot) -> int:
        spec = slot.spec
        position = slot.num_computed
        is_long = 0 < self.rope_switch_len < position
        _must(spec.long_rope == is_long, "sampled by the other rotary tables")
        is_suppressed = position - spec.prompt_len < spec.min_tokens
        suppressed = frozenset(spec.suppressed_token_ids if is_suppressed else ())
        counts: tuple[int, ...] = ()
        if uses_penalties(spec.sampling):
            first = spec.penalty_token_ids
            _must(list(first) == slot.history[: len(first)], "the penalty tokens are wrong")
            known = max(len(first), 1)
            counts = tuple(sorted([*first, *slot.history[known:]]))
        return sample(slot.state, position, spec.choice, spec.sampling, suppressed, counts)


def _must(condition: bool, breach: str) -> None:
    if not condition:
        raise Breach(breach)
