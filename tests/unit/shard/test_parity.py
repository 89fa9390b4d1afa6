"""Paged, chunked, batched logits equal plain transformers' for every supported architecture.

Models go through the loader: what is compared is what would be served.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from infermesh.config import ShardConfig
from services.shard.batch import pack
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
from services.shard.loading import load_model
from services.shard.slots import ActiveRow
from services.shard.stepping import StepRunner
from services.shard.supported import MODEL_TYPES
from tests.architectures import ARCHITECTURES, VARIANTS, VOCAB_SIZE
from tests.compiled_kernels import has_kernels
from tests.tiny_models import write_tiny_model
from tests.unit.shard.rows import active_row

BLOCK = 4
# float32 through a few layers; logits are of order 10
TOLERANCE = {"rtol": 1e-5, "atol": 2e-4}


def _load(
    directory: Path,
    model_type: str,
    overrides: dict[str, Any],
    kernels: str = "auto",
    kv_cache_dtype: str = "auto",
) -> tuple[Any, Any]:
    """(our loaded model, transformers' own)."""
    write_tiny_model(directory, model_type, **overrides)
    spec = LoadSpec(
        str(directory),
        block_size=BLOCK,
        num_blocks=120,
        max_num_seqs=8,
        max_batch_tokens=512,
        kv_cache_dtype=kv_cache_dtype,
    )
    config = ShardConfig(device="cpu", num_threads=1, kernels=kernels)
    loaded = load_model(spec, config, lambda progress: None)
    reference = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    return loaded, reference.eval()


def test_every_supported_model_type_is_tested_here() -> None:
    assert sorted(ARCHITECTURES) == sorted(MODEL_TYPES)


# Compiled kernels where there are any, and torch's operations.
@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_when_steps_mix_chunks_and_decodes(
    variant: str, kernels: str, tmp_path: Path
) -> None:
    loaded, reference = _load(
        tmp_path, VARIANTS[variant].model_type, dict(VARIANTS[variant].fields), kernels
    )
    rng = random.Random(variant)
    sequences = [
        [rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in (70, 41, 33, 7, 1)
    ]
    with torch.inference_mode():
        wanted = [reference(torch.tensor([tokens])).logits[0] for tokens in sequences]
    switch_len = loaded.manifest.rope_switch_len
    blocks = rng.sample(range(120), 120)
    tables = np.array(blocks[: 5 * 20]).reshape(5, 20)
    done = [0] * len(sequences)
    compared = 0
    while any(done[i] < len(tokens) for i, tokens in enumerate(sequences)):
        rows: list[ActiveRow] = []
        sample = rng.random() < 0.85  # else a step of chunks, whose logits nobody needs
        for i, tokens in enumerate(sequences):
            left = len(tokens) - done[i]
            if left == 0 or rng.random() < 0.2:
                continue
            size = 1 if rng.random() < 0.8 else min(left, rng.randint(1, 30))
            chunk = tokens[done[i] : done[i] + size]
            rows.append(
                active_row(
                    Sampling(),
                    slot=i,
                    start=done[i],
                    token_ids=chunk,
                    block_ids=[0],
                    long_rope=0 < switch_len < len(tokens),
                    sample=sample,
                )
            )
        if not rows:
            continue
        batch = pack(rows, tables, BLOCK)
        with torch.inference_mode():
            logits = loaded.engine._forward.logits(batch)
        for place, packed in enumerate(batch.sampled):
            row = rows[batch.order[packed]]
            slot = row.sequence.new.slot
            torch.testing.assert_close(
                logits[place], wanted[slot][row.context_len - 1], **TOLERANCE
            )
            compared += 1
        for row in rows:
            done[row.sequence.new.slot] = row.context_len
    assert compared > 20


def _greedy(runner: StepRunner, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """All prompts at once, each on its own shuffled blocks."""
    rng = random.Random(0)
    blocks = rng.sample(range(120), 120)
    new, rows = [], []
    for slot, prompt in enumerate(prompts):
        count = -(-(len(prompt) + num_tokens) // BLOCK)
        table = [BlockId(blocks.pop()) for _ in range(count)]
        new.append(NewSequence(Slot(slot), table, 0, len(prompt), 0, Sampling(temperature=0.0)))
        rows.append(Row(Slot(slot), len(prompt), RowSource.LITERAL, prompt, sample=True))
    outputs: list[list[int]] = [[] for _ in prompts]
    for step in range(num_tokens):
        outcome = runner.execute(
            Step(Epoch(1), StepId(step + 1), new_sequences=new, rows=rows), 0.0
        )
        for row in outcome.rows:
            assert row.token_id is not None
            outputs[row.slot].append(row.token_id)
        new = []
        rows = [Row(Slot(i), 1, RowSource.LAST, sample=True) for i in range(len(prompts))]
    return outputs


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_greedy_tokens_equal_generate_when_prompts_run_together(
    model_type: str, tmp_path: Path
) -> None:
    loaded, reference = _load(tmp_path, model_type, {})
    rng = random.Random(model_type)
    prompts = [[rng.randrange(4, VOCAB_SIZE) for _ in range(n)] for n in (3, 20, 31, 1)]
    got = _greedy(StepRunner(loaded), prompts, 24)
    for prompt, tokens in zip(prompts, got, strict=True):
        wanted = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=VOCAB_SIZE + 1,  # none
        )
        assert tokens == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "bfloat16"])
def test_tokens_are_the_same_when_a_prefix_comes_from_copied_and_shared_blocks(
    tmp_path: Path, kv_cache_dtype: str
) -> None:
    loaded, _ = _load(tmp_path, "llama", {}, kv_cache_dtype=kv_cache_dtype)
    runner = StepRunner(loaded)
    prompt = list(range(10, 21))  # two full blocks and three tokens
    greedy = Sampling(temperature=0.0, top_logprobs=5)
    first = NewSequence(Slot(0), [BlockId(b) for b in (5, 9, 2)], 0, 11, 0, greedy)
    whole = [Row(Slot(0), 11, RowSource.LITERAL, prompt, sample=True)]
    alone = runner.execute(Step(Epoch(1), StepId(1), new_sequences=[first], rows=whole), 0.0)
    # The last block is copied on write; only its last token is computed again.
    shared = NewSequence(Slot(1), [BlockId(b) for b in (5, 9, 33)], 10, 11, 0, greedy)
    outcome = runner.execute(
        Step(
            Epoch(1),
            StepId(2),
            block_copies=[(BlockId(2), BlockId(33))],
            new_sequences=[shared],
            rows=[Row(Slot(1), 1, RowSource.LITERAL, prompt[10:], sample=True)],
        ),
        0.0,
    )
    assert outcome.rows[0].token_id == alone.rows[0].token_id
    if has_kernels():  # then bits don't depend on chunks
        assert outcome.rows[0].logprobs == alone.rows[0].logprobs


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_other_rows_are_untouched_when_one_sequence_becomes_nan(
    model_type: str, tmp_path: Path
) -> None:
    loaded, _ = _load(tmp_path, model_type, {})
    poison = 77
    with torch.no_grad():
        loaded.engine._forward._model.model.embed_tokens.weight[poison] = float("nan")
    prompts = [[5, 6, 7, 8, 9], [30, 31], [40] * 12]
    clean = _greedy(StepRunner(loaded), prompts, 6)
    runner = StepRunner(loaded)
    greedy = Sampling(temperature=0.0)
    news = [
        NewSequence(
            Slot(i), [BlockId(b) for b in range(6 * i, 6 * i + 6)], 0, len(prompt), 0, greedy
        )
        for i, prompt in enumerate([*prompts, [9, poison, 9]])
    ]
    rows = [
        Row(Slot(i), len(prompt), RowSource.LITERAL, prompt, sample=True)
        for i, prompt in enumerate([*prompts, [9, poison, 9]])
    ]
    got: list[list[int | None]] = [[] for _ in range(4)]
    for step in range(6):
        outcome = runner.execute(
            Step(Epoch(1), StepId(step + 1), new_sequences=news, rows=rows), 0.0
        )
        for row in outcome.rows:
            got[row.slot].append(row.token_id)
        news, rows = [], [Row(Slot(i), 1, RowSource.LAST, sample=True) for i in range(4)]
    assert got[:3] == clean
    assert got[3] == [None] * 6
