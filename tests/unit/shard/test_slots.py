"""The slots' rules, alone and against a model of what each slot holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from infermesh.errors import InvalidRequest, ProtocolViolation
from services.shard.domain import (
    BlockId,
    Capacity,
    Epoch,
    Manifest,
    NewSequence,
    Row,
    RowSource,
    RowStatus,
    Sampling,
    Slot,
    Step,
    StepId,
)
from services.shard.engine import LoadedModel
from services.shard.noise import Purpose, uniforms
from services.shard.simulated import SimulatedEngine, StepProfile
from services.shard.stepping import StepRunner

CAPACITY = Capacity(
    num_blocks=64, block_size=4, max_num_seqs=4, max_batch_tokens=24, kv_cache_bytes=0
)
VOCAB = 50
TOKENS = list(range(10, 40))
MAX_LEN = 64


def _runner() -> StepRunner:
    manifest = Manifest(
        "m", "", "llama", "simulated", MAX_LEN, VOCAB, (), None, None, "", "", "", 0, 0, "", 0
    )
    engine = SimulatedEngine(StepProfile(), TOKENS, 0, sleep=lambda seconds: None)
    return StepRunner(LoadedModel(engine, manifest, CAPACITY, "simulated", ()))


def _new(slot: int = 0, **fields: Any) -> NewSequence:
    values = {
        "slot": Slot(slot),
        "block_ids": [BlockId(b) for b in range(16)],
        "num_computed_tokens": 0,
        "prompt_len": 3,
        "choice": 0,
        "sampling": Sampling(seed=5),
    }
    return NewSequence(**{**values, **fields})


def _prompt(slot: int = 0, tokens: tuple[int, ...] = (1, 2, 3), **fields: Any) -> Row:
    return Row(Slot(slot), len(tokens), RowSource.LITERAL, tokens, sample=True, **fields)


def _last(slot: int = 0) -> Row:
    return Row(Slot(slot), 1, RowSource.LAST, sample=True)


def _step(**fields: Any) -> Step:
    return Step(Epoch(1), StepId(1), **fields)


def _token(seed: int, choice: int, position: int) -> int:
    noise = uniforms([seed], [choice], [position], Purpose.SIMULATED_TOKEN)[0]
    return TOKENS[int(noise * len(TOKENS))]


@pytest.mark.parametrize(
    "step",
    [
        _step(new_sequences=[_new(4)]),
        _step(new_sequences=[_new(block_ids=[BlockId(64)])]),
        _step(new_sequences=[_new(num_computed_tokens=65)]),
        _step(new_sequences=[_new(block_ids=[BlockId(0)] * 18)]),
        _step(new_sequences=[_new(penalty_token_ids=[1])]),
        _step(new_sequences=[_new(), _new()]),
        _step(new_sequences=[_new()], rows=[_prompt(), _prompt()]),
        _step(new_sequences=[_new()], rows=[_prompt(tokens=(1,) * 25)]),
        _step(new_sequences=[_new()], rows=[_prompt(tokens=())]),
        _step(new_sequences=[_new()], rows=[_prompt(tokens=(1, 2))]),  # samples in the prompt
        _step(new_sequences=[_new()], rows=[replace(_prompt(), num_tokens=2)]),
        _step(new_sequences=[_new()], rows=[_last()]),
        _step(new_sequences=[_new(block_ids=[])], rows=[_prompt()]),
        _step(rows=[_prompt()]),
        _step(rows=[_prompt(slot=-1)]),
        _step(finished=[Slot(4)]),
        _step(block_copies=[(BlockId(0), BlockId(64))]),
    ],
)
def test_step_is_a_violation_when_it_breaks_the_contract(step: Step) -> None:
    with pytest.raises(ProtocolViolation):
        _runner().execute(step, 0.0)


def test_sequence_is_a_violation_when_its_slot_holds_a_living_one() -> None:
    runner = _runner()
    runner.execute(_step(new_sequences=[_new()], rows=[_prompt()]), 0.0)
    with pytest.raises(ProtocolViolation, match="not finished"):
        runner.execute(_step(new_sequences=[_new()]), 0.0)
    runner = _runner()
    runner.execute(_step(new_sequences=[_new()]), 0.0)
    runner.execute(_step(finished=[Slot(0)], new_sequences=[_new()], rows=[_prompt()]), 0.0)


def test_last_is_a_violation_when_the_row_before_sampled_nothing() -> None:
    runner = _runner()
    silent = Row(Slot(0), 2, RowSource.LITERAL, (1, 2))
    runner.execute(_step(new_sequences=[_new()], rows=[silent]), 0.0)
    with pytest.raises(ProtocolViolation, match="sampled nothing"):
        runner.execute(_step(rows=[_last()]), 0.0)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),  # no seed
        Sampling(seed=1, temperature=2.1),
        Sampling(seed=1, temperature=float("nan")),
        Sampling(seed=1, top_p=0.0),
        Sampling(seed=1, repetition_penalty=0.0),
        Sampling(seed=1, top_k=-1),
        Sampling(seed=1, top_logprobs=21),
        Sampling(seed=1, logit_bias={VOCAB: 1.0}),
        Sampling(seed=1, logit_bias={1: 101.0}),
    ],
)
def test_row_fails_alone_when_its_sampling_is_out_of_range(sampling: Sampling) -> None:
    runner = _runner()
    outcome = runner.execute(
        _step(new_sequences=[_new(0, sampling=sampling), _new(1)], rows=[_prompt(0), _prompt(1)]),
        0.0,
    )
    assert [row.status for row in outcome.rows] == [RowStatus.FAILED, RowStatus.OK]
    assert isinstance(outcome.rows[0].error, InvalidRequest)


def test_penalty_counts_grow_only_with_sampled_tokens_when_rows_run() -> None:
    runner = _runner()
    penalized = Sampling(seed=5, frequency_penalty=1.0)
    new = _new(sampling=penalized, penalty_token_ids=[1, 2, 3, 9, 9], num_computed_tokens=0)
    rows = [_prompt(tokens=(1, 2, 3, 9, 9))]
    first = runner.execute(_step(new_sequences=[new], rows=rows), 0.0).rows[0].token_id
    state = runner.slots.get(Slot(0))
    assert state is not None
    assert state.history is not None
    counts = dict(
        zip(state.history.token_ids.tolist(), state.history.output_counts.tolist(), strict=True)
    )
    wanted = {1: 0.0, 2: 0.0, 3: 0.0, 9: 2.0}
    assert first is not None
    wanted[first] = wanted.get(first, 0.0) + 1.0
    assert counts == wanted


@dataclass
class _Held:
    """What the test believes of a slot."""

    seed: int
    choice: int
    prompt_len: int
    position: int = 0
    has_last: bool = False
    dead: bool = False


class SlotMachine(RuleBasedStateMachine):
    """Random steps; every outcome is predicted from the test's own book-keeping."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = _runner()
        self.held: dict[int, _Held] = {}
        self.finished: list[Slot] = []
        self.new: list[NewSequence] = []
        self.rows: list[Row] = []
        self.wanted: list[tuple[RowStatus, int | None]] = []

    def _free(self) -> list[int]:
        return [slot for slot in range(4) if slot not in self.held]

    @precondition(lambda self: len(self.held) < 4 and not self.rows)
    @rule(
        data=st.data(),
        seed=st.integers(0, 2**64 - 1),
        choice=st.integers(0, 3),
        prompt_len=st.integers(1, 9),
        computed=st.integers(0, 8),
    )
    def place(
        self, data: st.DataObject, seed: int, choice: int, prompt_len: int, computed: int
    ) -> None:
        slot = data.draw(st.sampled_from(self._free()))
        computed = min(computed, prompt_len - 1)
        self.held[slot] = _Held(seed, choice, prompt_len, computed)
        self.new.append(
            _new(
                slot,
                sampling=Sampling(seed=seed),
                choice=choice,
                prompt_len=prompt_len,
                num_computed_tokens=computed,
            )
        )

    def _idle(self) -> list[int]:
        busy = {row.slot for row in self.rows}
        return [slot for slot in self.held if slot not in busy]

    @precondition(lambda self: bool(self._idle()))
    @rule(data=st.data(), size=st.integers(1, 6), bad=st.booleans())
    def run_row(self, data: st.DataObject, size: int, bad: bool) -> None:
        slot = data.draw(st.sampled_from(self._idle()))
        held = self.held[slot]
        if held.position + size > MAX_LEN:
            return
        if sum(row.num_tokens for row in self.rows) + size > CAPACITY.max_batch_tokens:
            return
        if held.dead:
            self.rows.append(_last(slot))
            self.wanted.append((RowStatus.SKIPPED, None))
            return
        if held.has_last and not bad:
            self.rows.append(_last(slot))
            end = held.position + 1
        else:
            end = held.position + size
            tokens = (VOCAB,) * size if bad else (1,) * size
            sample = end >= held.prompt_len
            self.rows.append(Row(Slot(slot), size, RowSource.LITERAL, tokens, sample=sample))
            if bad:
                held.dead = True
                self.wanted.append((RowStatus.FAILED, None))
                return
        sampled = end >= held.prompt_len
        token = _token(held.seed, held.choice, end) if sampled else None
        held.position, held.has_last = end, sampled
        self.wanted.append((RowStatus.OK, token))

    @precondition(lambda self: bool(self._idle()) and not self.new)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self._idle()))
        del self.held[slot]
        self.finished.append(Slot(slot))

    @rule()
    def execute(self) -> None:
        outcome = self.runner.execute(
            _step(finished=self.finished, new_sequences=self.new, rows=self.rows), 0.0
        )
        assert [(row.status, row.token_id) for row in outcome.rows] == self.wanted
        assert [row.slot for row in outcome.rows] == [row.slot for row in self.rows]
        self.finished, self.new, self.rows, self.wanted = [], [], [], []

    @precondition(lambda self: not self.rows)
    @rule()
    def open_epoch(self) -> None:
        self.runner.reset()
        self.held.clear()
        self.finished, self.new = [], []

    @invariant()
    def slots_hold_what_is_believed(self) -> None:
        if self.rows or self.new or self.finished:
            return
        for slot in range(4):
            state = self.runner.slots.get(Slot(slot))
            held = self.held.get(slot)
            assert (state is None) == (held is None)
            if state is not None and held is not None and not held.dead:
                assert state.position == held.position


TestSlots = SlotMachine.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
