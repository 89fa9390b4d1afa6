"""Logits are computed for the tokens that are sampled from alone: counted at the head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from infermesh.config import ShardConfig
from services.shard.domain import (
    BlockId,
    Epoch,
    LoadSpec,
    NewSequence,
    Row,
    RowSource,
    RowStatus,
    Sampling,
    Slot,
    Step,
    StepId,
)
from services.shard.loading import load_model
from services.shard.stepping import StepRunner
from services.shard.tiles import TILE
from tests.tiny_models import write_tiny_model

PROMPT = list(range(10, 26))


@pytest.fixture(params=[False, True], ids=["plain", "deterministic"])
def counted(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[StepRunner, list[int], int]:
    """A runner, the rows of logits of each time its head was computed, and what rows come in."""
    write_tiny_model(tmp_path, "llama")
    spec = LoadSpec(str(tmp_path), block_size=4, num_blocks=64, max_num_seqs=3)
    config = ShardConfig(device="cpu", num_threads=1, deterministic=request.param)
    loaded = load_model(spec, config, lambda progress: None)
    model: Any = loaded.engine._forward._model  # type: ignore[attr-defined]
    rows: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: rows.append(output.shape[-2]))
    return StepRunner(loaded), rows, TILE if request.param else 1


def new(slot: int) -> NewSequence:
    blocks = [BlockId(20 * slot + block) for block in range(12)]
    return NewSequence(Slot(slot), blocks, 0, len(PROMPT), 0, Sampling(temperature=0.0))


def chunk(slot: int, tokens: Sequence[int], *, sample: bool) -> Row:
    return Row(Slot(slot), len(tokens), RowSource.LITERAL, tokens, sample=sample)


def test_the_head_is_computed_for_the_rows_that_sample_alone(
    counted: tuple[StepRunner, list[int], int],
) -> None:
    runner, rows, multiple = counted

    def run(step: int, *step_rows: Row, started: Sequence[NewSequence] = ()) -> None:
        outcome = runner.execute(
            Step(Epoch(1), StepId(step), new_sequences=started, rows=step_rows), 0.0
        )
        assert [row.status for row in outcome.rows] == [RowStatus.OK] * len(step_rows)
        assert [row.token_id is not None for row in outcome.rows] == [r.sample for r in step_rows]

    run(1, chunk(0, PROMPT[:8], sample=False), started=[new(0)])
    run(
        2,
        chunk(0, PROMPT[8:12], sample=False),
        chunk(1, PROMPT[:5], sample=False),
        started=[new(1)],
    )
    assert rows == []  # chunks of prompts alone: no head at all
    run(3, chunk(0, PROMPT[12:], sample=True), chunk(1, PROMPT[5:9], sample=False))
    assert rows == [multiple]  # four tokens that sample once, beside four that don't
    last = Row(Slot(0), 1, RowSource.LAST, sample=True)
    run(4, last, chunk(1, PROMPT[9:], sample=True))
    assert rows == [multiple, max(2, multiple)]
