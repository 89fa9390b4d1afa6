"""The simulated engine: its clock is its profile, its tokens are words, and torch stays away."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from infermesh.config import ShardConfig
from infermesh.errors import ModelLoadFailed, NumericalError
from services.shard.domain import LoadSpec, Sampling
from services.shard.loading import load_model
from services.shard.simulated import (
    REHEARSED_EXIT,
    SimulatedEngine,
    StepProfile,
    read_profile,
)
from tests.tiny_models import write_tiny_model, write_tokenizer
from tests.unit.shard.rows import active_row

TABLES = np.zeros((1, 1), dtype=np.int64)


def test_step_takes_what_the_profile_says_when_rows_are_mixed() -> None:
    slept: list[float] = []
    profile = StepProfile(
        fixed_us=1000, per_prefill_token_us=10, per_decode_row_us=100, per_context_token_us=1
    )
    engine = SimulatedEngine(profile, [7], 0, sleep=slept.append)
    rows = [
        active_row(Sampling(seed=1), start=49),
        active_row(Sampling(seed=2), token_ids=(1, 2, 3)),
    ]
    engine.compute(rows, TABLES)
    assert slept == [pytest.approx((1000 + 3 * 10 + 100 + (50 + 3)) / 1e6)]


def test_tokens_do_not_depend_on_the_seed_when_greedy() -> None:
    engine = SimulatedEngine(StepProfile(), list(range(100)), 0, sleep=lambda seconds: None)
    rows = [active_row(Sampling(temperature=0.0, seed=s), start=9) for s in (1, 2)]
    first, second = engine.compute(rows, TABLES).draws
    assert first.token_id == second.token_id


def test_tokens_repeat_when_seed_and_position_do() -> None:
    engine = SimulatedEngine(StepProfile(), list(range(100)), 0, sleep=lambda seconds: None)
    rows = [active_row(Sampling(seed=s), start=p) for s in (1, 2) for p in range(20)]
    together = [draw.token_id for draw in engine.compute(rows, TABLES).draws]
    alone = [engine.compute([row], TABLES).draws[0].token_id for row in reversed(rows)][::-1]
    assert together == alone
    assert together[:20] != together[20:]


def test_load_needs_no_weights_and_draws_words_when_simulated(tmp_path: Path) -> None:
    directory = tmp_path / "bare"
    write_tokenizer(directory)
    shutil.copy(write_tiny_model(tmp_path / "whole") / "config.json", directory)
    config = ShardConfig(engine="simulated")
    loaded = load_model(LoadSpec(str(directory)), config, lambda progress: None)
    assert loaded.device == "simulated"
    assert loaded.manifest.architecture == "llama"
    assert loaded.capacity.num_blocks == 64 * 512 // 16
    rows = [active_row(Sampling(seed=1), start=i) for i in range(50)]
    tokens = [draw.token_id or 0 for draw in loaded.engine.compute(rows, TABLES).draws]
    text = Tokenizer.from_file(str(directory / "tokenizer.json")).decode(tokens)
    assert text.replace(" ", "").isalpha()


def rehearsal(ends: list[int] | None = None, **profile: int) -> SimulatedEngine:
    def end_process(code: int) -> None:
        assert ends is not None
        ends.append(code)

    return SimulatedEngine(StepProfile(**profile), [7], 0, lambda seconds: None, end_process)


def test_process_ends_when_the_exit_token_is_run() -> None:
    ends: list[int] = []
    engine = rehearsal(ends, exit_token_id=5)
    engine.compute([active_row(Sampling(seed=1), token_ids=(1, 6))], TABLES)
    assert ends == []
    engine.compute([active_row(Sampling(seed=1), token_ids=(1, 5, 6))], TABLES)
    assert ends == [REHEARSED_EXIT]


def test_whole_step_raises_when_the_fail_token_is_run() -> None:
    engine = rehearsal(fail_token_id=5)
    sound, bad = [active_row(Sampling(seed=1), token_ids=ids) for ids in ((4, 6), (5,))]
    with pytest.raises(RuntimeError, match="rehearsed"):
        engine.compute([sound, bad], TABLES)
    assert engine.compute([sound], TABLES).draws[0].token_id == 7


def test_row_fails_alone_when_it_runs_the_nan_token() -> None:
    engine = rehearsal(nan_token_id=5)
    rows = [active_row(Sampling(seed=1), token_ids=ids) for ids in ((4, 6), (5,))]
    sound, bad = engine.compute(rows, TABLES).draws
    assert (sound.token_id, sound.error) == (7, None)
    assert isinstance(bad.error, NumericalError)


def test_step_runs_out_of_memory_when_it_has_more_tokens_than_rehearsed() -> None:
    engine = rehearsal(oom_above_tokens=3)
    rows = [active_row(Sampling(seed=1), token_ids=ids) for ids in ((4, 6), (5, 8))]
    with pytest.raises(MemoryError):
        engine.compute(rows, TABLES)
    assert engine.compute(rows[:1], TABLES).draws[0].token_id == 7


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"fixed_ms": 1}',
        '{"fixed_us": -1}',
        '{"fixed_us": "fast"}',
        '{"fail_token_id": 1.5}',
        '{"exit_token_id": true}',
        '{"oom_above_tokens": -1}',
    ],
)
def test_profile_is_refused_by_name_when_it_is_wrong(tmp_path: Path, content: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(ModelLoadFailed, match=r"profile\.json"):
        read_profile(str(path))


def test_profile_is_the_file_when_one_is_given(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"fixed_us": 12, "exit_token_id": 9}))
    assert read_profile(str(path)) == StepProfile(fixed_us=12, exit_token_id=9)
    assert read_profile("") == StepProfile()
