"""Tables for short and long sequences: when a model has them, and none is used past its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infermesh.config import ShardConfig
from infermesh.errors import ProtocolViolation
from services.shard.domain import (
    BlockId,
    Epoch,
    LoadSpec,
    NewSequence,
    Row,
    RowSource,
    Sampling,
    Slot,
    Step,
    StepId,
)
from services.shard.engine import LoadedModel
from services.shard.loading import load_model
from services.shard.stepping import StepRunner
from tests.architectures import VARIANTS
from tests.tiny_models import write_tiny_model

SWITCH_LEN = 40
(LONGROPE,) = (v for v in VARIANTS.values() if v.model_type == "phi3" and "longrope" in v.name)


def load(tmp_path: Path, **fields: Any) -> LoadedModel:
    directory = write_tiny_model(tmp_path, "phi3", **LONGROPE.fields)
    spec = LoadSpec(str(directory), **{"num_blocks": 8, **fields})
    return load_model(spec, ShardConfig(device="cpu", num_threads=1), lambda progress: None)


@pytest.mark.parametrize(("max_model_len", "wanted"), [(0, SWITCH_LEN), (41, SWITCH_LEN), (40, 0)])
def test_manifest_names_the_switch_when_a_sequence_can_get_there(
    tmp_path: Path, max_model_len: int, wanted: int
) -> None:
    assert load(tmp_path, max_model_len=max_model_len).manifest.rope_switch_len == wanted


@pytest.mark.parametrize("length", [SWITCH_LEN, SWITCH_LEN + 1])
@pytest.mark.parametrize("long_rope", [False, True])
def test_step_is_refused_when_a_short_sequence_is_too_long(
    tmp_path: Path, length: int, long_rope: bool
) -> None:
    runner = StepRunner(load(tmp_path))
    blocks = [BlockId(i) for i in range(3)]
    new = NewSequence(Slot(0), blocks, 0, length, 0, Sampling(temperature=0.0), long_rope=long_rope)
    row = Row(Slot(0), length, RowSource.LITERAL, [7] * length, sample=True)
    step = Step(Epoch(1), StepId(1), new_sequences=[new], rows=[row])
    if long_rope or length <= SWITCH_LEN:
        assert runner.execute(step, 0.0).rows[0].token_id is not None
    else:
        with pytest.raises(ProtocolViolation, match="grew past 40"):
            runner.execute(step, 0.0)
