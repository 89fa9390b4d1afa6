"""A computation that raises costs the row that makes it raise; too little memory costs time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infermesh.errors import Internal, OutOfMemory, ProtocolViolation
from services.shard.batch_limit import BatchLimit
from services.shard.containment import ContainedEngine, cut, is_out_of_memory, num_tokens
from services.shard.domain import Sampling
from services.shard.engine import Computed, Draw
from services.shard.slots import ActiveRow
from tests.unit.shard.rows import active_row

TABLES = np.zeros((1, 1), dtype=np.int64)


class Device:
    """Draws a row's last token; raises as it is told, and remembers what it computed."""

    def __init__(self, fault: Callable[[Sequence[ActiveRow]], Exception | None]) -> None:
        self.fault = fault
        self.done: list[tuple[int, ...]] = []
        self.batches: list[int] = []

    def copy_blocks(self, pairs: Any) -> None:
        raise AssertionError("no step of these tests copies")

    def compute(self, rows: Sequence[ActiveRow], block_tables: Any) -> Computed:
        self.batches.append(sum(row.num_tokens for row in rows))
        error = self.fault(rows)
        if error is not None:
            raise error
        self.done += [tuple(row.token_ids) for row in rows]
        return Computed([Draw(row.token_ids[-1] if row.sample else None) for row in rows], 0.5)


def rows_of(*token_ids: tuple[int, ...]) -> list[ActiveRow]:
    return [active_row(Sampling(), slot=i, token_ids=ids) for i, ids in enumerate(token_ids)]


def raises_on(bad: set[int]) -> Callable[[Sequence[ActiveRow]], Exception | None]:
    def fault(rows: Sequence[ActiveRow]) -> Exception | None:
        met = bad & {token for row in rows for token in row.token_ids}
        return RuntimeError(f"token {min(met)} of the prompt") if met else None

    return fault


def holds(limit: int) -> Callable[[Sequence[ActiveRow]], Exception | None]:
    def fault(rows: Sequence[ActiveRow]) -> Exception | None:
        return MemoryError() if sum(row.num_tokens for row in rows) > limit else None

    return fault


@given(st.integers(2, 12), st.data())
def test_only_the_rows_that_raise_fail_when_others_do_not(count: int, data: st.DataObject) -> None:
    bad = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count - 1))
    engine = ContainedEngine(Device(raises_on(bad)))
    draws = engine.compute(rows_of(*((i,) for i in range(count))), TABLES).draws
    for i, draw in enumerate(draws):
        if i in bad:
            assert draw.error is not None
            assert (type(draw.error), draw.token_id) == (Internal, None)
            assert "prompt" not in draw.error.message
        else:
            assert (draw.token_id, draw.error) == (i, None)


@pytest.mark.parametrize("count", [1, 5])
def test_the_step_fails_as_a_whole_when_every_row_raises(count: int) -> None:
    engine = ContainedEngine(Device(lambda rows: RuntimeError("the device is gone")))
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.compute(rows_of(*((i,) for i in range(count))), TABLES)


def test_a_broken_contract_is_not_contained() -> None:
    device = Device(lambda rows: ProtocolViolation("a sequence grew"))
    with pytest.raises(ProtocolViolation):
        ContainedEngine(device).compute(rows_of((1,), (2,)), TABLES)
    assert device.batches == [2]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12))
def test_everything_is_computed_in_order_when_memory_is_short(lens: list[int], limit: int) -> None:
    device = Device(holds(limit))
    rows = rows_of(*(tuple(range(100 * i, 100 * i + n)) for i, n in enumerate(lens)))
    draws = ContainedEngine(device).compute(rows, TABLES).draws
    assert [draw.token_id for draw in draws] == [row.token_ids[-1] for row in rows]
    assert [t for ids in device.done for t in ids] == [t for row in rows for t in row.token_ids]


def test_a_token_fails_alone_when_it_has_no_memory_even_alone() -> None:
    def fault(rows: Sequence[ActiveRow]) -> Exception | None:
        met = any(7 in row.token_ids for row in rows)
        return RuntimeError("DefaultCPUAllocator: can't allocate memory") if met else None

    device = Device(fault)
    draws = ContainedEngine(device).compute(rows_of((1, 2), (6, 7, 8), (3,)), TABLES).draws
    assert [draw.token_id for draw in draws] == [2, None, 3]
    assert isinstance(draws[1].error, OutOfMemory)
    assert not any(8 in ids for ids in device.done)  # it would rely on what failed


def test_the_next_step_is_cut_in_advance_when_one_did_not_fit() -> None:
    device = Device(holds(4))
    engine = ContainedEngine(device)
    rows = rows_of(*((i,) for i in range(8)))
    engine.compute(rows, TABLES)
    device.batches.clear()
    engine.compute(rows, TABLES)
    assert device.batches == [4, 4]


def test_memory_that_comes_back_is_used_again_after_some_patience() -> None:
    device = Device(holds(4))
    engine = ContainedEngine(device, BatchLimit(patience=3))
    rows = rows_of(*((i,) for i in range(8)))
    engine.compute(rows, TABLES)
    device.fault = holds(100)
    for _ in range(20):
        engine.compute(rows, TABLES)
    assert device.batches[-1] == 8


def test_a_try_costs_one_computation_when_memory_is_still_short() -> None:
    device = Device(holds(4))
    engine = ContainedEngine(device, BatchLimit(patience=5))
    rows = rows_of(*((i,) for i in range(8)))
    engine.compute(rows, TABLES)
    device.batches.clear()
    for _ in range(40):
        engine.compute(rows, TABLES)
    refused = [size for size in device.batches if size > 4]
    assert set(refused) == {5}
    assert len(refused) <= 8


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12))
def test_cut_keeps_every_token_and_samples_with_the_last(lens: list[int], limit: int) -> None:
    rows = rows_of(*(tuple(range(100 * i, 100 * i + n)) for i, n in enumerate(lens)))
    parts = cut(list(enumerate(rows)), limit)
    assert all(num_tokens(part) <= limit for part in parts)
    for place, row in enumerate(rows):
        pieces = [piece for part in parts for p, piece in part if p == place]
        assert [t for piece in pieces for t in piece.token_ids] == list(row.token_ids)
        assert [piece.start for piece in pieces] == [
            row.start + sum(p.num_tokens for p in pieces[:i]) for i in range(len(pieces))
        ]
        assert [piece.sample for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_torchs_own_want_of_memory_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA"))
    assert not is_out_of_memory(RuntimeError("a shape is wrong"))


def test_a_row_that_fits_nowhere_does_not_shrink_the_steps_of_others() -> None:
    def fault(rows: Sequence[ActiveRow]) -> Exception | None:
        return MemoryError() if any(7 in row.token_ids for row in rows) else None

    device = Device(fault)
    engine = ContainedEngine(device)
    draws = engine.compute(rows_of(*((i,) for i in range(16))), TABLES).draws
    assert [i for i, draw in enumerate(draws) if draw.error is not None] == [7]
    device.batches.clear()
    engine.compute(rows_of(*((i,) for i in range(20, 36))), TABLES)
    assert device.batches == [16]
