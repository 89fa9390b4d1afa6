"""A token whose state is NaN fails its own request, in the very chunk that runs it: what the chunk
wrote before that token is NaN, too, and must not be offered to others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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
    StepOutcome,
)
from services.shard.loading import load_model
from services.shard.stepping import StepRunner
from tests.tiny_models import write_tiny_model

POISON = 200
CLEAN = list(range(10, 26))
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def model_directory(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model in which one token's embedding is NaN."""
    directory = write_tiny_model(
        tmp_path_factory.mktemp("poisoned"), request.param, tie_word_embeddings=False
    )
    weights = load_file(directory / "model.safetensors")
    (name,) = (n for n in weights if n.endswith(("embed_tokens.weight", "wte.weight")))
    weights[name][POISON] = float("nan")
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def _run(
    runner: StepRunner, step_id: int, slot: int, prompt: list[int], *, sample: bool
) -> StepOutcome:
    blocks = [BlockId(20 * slot + block) for block in range(12)]
    new = NewSequence(Slot(slot), blocks, 0, 40 if not sample else len(prompt), 0, GREEDY)
    row = Row(Slot(slot), len(prompt), RowSource.LITERAL, prompt, sample=sample)
    return runner.execute(Step(Epoch(1), StepId(step_id), new_sequences=[new], rows=[row]), 0.0)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("chunk", [[*CLEAN, POISON, 30, 31], [*CLEAN, POISON], [POISON]])
def test_a_chunk_fails_when_a_token_in_it_is_nan_though_nothing_is_sampled(
    model_directory: Path, chunk: list[int], deterministic: bool
) -> None:
    spec = LoadSpec(
        str(model_directory), block_size=4, num_blocks=64, max_num_seqs=3, max_batch_tokens=64
    )
    config = ShardConfig(device="cpu", num_threads=1, deterministic=deterministic)
    loaded = load_model(spec, config, lambda progress: None)
    runner = StepRunner(loaded)

    (poisoned,) = _run(runner, 1, 0, chunk, sample=False).rows
    (clean,) = _run(runner, 2, 1, CLEAN, sample=False).rows
    (sampled,) = _run(runner, 3, 2, CLEAN, sample=True).rows

    assert poisoned.status is RowStatus.FAILED
    assert poisoned.error is not None
    assert poisoned.error.code == "numerical_error"
    assert (clean.status, sampled.status) == (RowStatus.OK, RowStatus.OK)
    pool = loaded.engine._pool  # type: ignore[attr-defined]
    assert all(torch.isfinite(part[20:24]).all() for part in (*pool.keys, *pool.values))
