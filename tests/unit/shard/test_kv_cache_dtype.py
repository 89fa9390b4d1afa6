"""Models whose K and V are kept in bfloat16: how far they are from float32, and what they keep."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.shard.kv_pool import KvPool
from tests.architectures import VARIANTS, VOCAB_SIZE
from tests.compiled_kernels import needs_kernels
from tests.tiny_models import write_tiny_model
from tests.unit.shard.quantized_models import load, mixed_logits
from tests.unit.shard.test_deterministic import alone_and_disturbed

DRAWS = 4
Logits = dict[tuple[int, int], torch.Tensor]


def _sequences(seed: str) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in (70, 41, 33, 7, 1)]


def _round_at_random(states: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """To either neighbour in bfloat16, the nearer the likelier: right on average."""
    noise = torch.randint(0, 1 << 16, states.shape, generator=draw, dtype=torch.int32)
    return ((states.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)


def _errors(got: Logits, wanted: list[torch.Tensor]) -> torch.Tensor:
    """Root mean square over the vocabulary, for each position."""
    return torch.stack([(v - wanted[i][at]).square().mean().sqrt() for (i, at), v in got.items()])


@pytest.mark.parametrize("kernels", [pytest.param("auto", marks=needs_kernels), "off"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_nearer_to_transformers_than_with_keys_and_values_rounded_at_random(
    variant: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an interval of bfloat16, rounding to the nearest is wrong by the square root of 1/12 on
    average, rounding at random by that of 1/6. Through a model small errors grow in proportion, so
    the former's are to be 0.71 times as large; as large they would be with a rounding too many, and
    larger with bits cut off. Medians: an expert may be another where two are about as good."""
    directory = write_tiny_model(
        tmp_path, VARIANTS[variant].model_type, **dict(VARIANTS[variant].fields)
    )
    reference = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    sequences = _sequences(variant)
    with torch.inference_mode():
        wanted = [reference(torch.tensor([tokens])).logits[0] for tokens in sequences]
    loaded: Any = load(directory, kernels, kv_cache_dtype="bfloat16")
    assert loaded.engine._pool.keys[0].dtype is torch.bfloat16
    errors = _errors(mixed_logits(loaded, sequences, random.Random(variant)), wanted)

    write = KvPool.write
    draw = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        KvPool,
        "write",
        lambda pool, layer, slots, *states: write(
            pool, layer, slots, *(_round_at_random(state, draw) for state in states)
        ),
    )
    wide = load(directory, "off")
    at_random = torch.stack(
        [
            _errors(mixed_logits(wide, sequences, random.Random(variant)), wanted)
            for _ in range(DRAWS)
        ]
    )
    ratio = float(errors.median() / at_random.median())
    print(f"{variant} {kernels}: {ratio:.2f}")
    assert ratio < 1


@needs_kernels
@pytest.mark.parametrize("variant", ["llama", "qwen2", "gemma3_text", "gpt2"])
def test_answers_have_the_same_bits_whatever_else_is_computed_and_in_which_chunks(
    variant: str, tmp_path: Path
) -> None:
    directory = write_tiny_model(
        tmp_path, VARIANTS[variant].model_type, **dict(VARIANTS[variant].fields)
    )
    loaded = load(directory, kv_cache_dtype="bfloat16", num_blocks=400)
    alone, disturbed = alone_and_disturbed(loaded, variant)
    for answers in disturbed:
        assert answers == alone


@pytest.mark.parametrize(
    ("stored", "fields", "kept"),
    [
        (torch.bfloat16, {}, torch.bfloat16),
        (torch.float32, {}, torch.float32),
        (torch.float16, {}, torch.float32),
        (torch.bfloat16, {"dtype": "float32"}, torch.float32),
        (torch.float32, {"dtype": "bfloat16"}, torch.bfloat16),
        (torch.bfloat16, {"kv_cache_dtype": "float32"}, torch.float32),
        (torch.float32, {"kv_cache_dtype": "bfloat16"}, torch.bfloat16),
        (torch.bfloat16, {"quantize": "int8"}, torch.bfloat16),
        (torch.float32, {"quantize": "int8"}, torch.float32),
    ],
)
@needs_kernels
def test_keys_and_values_are_kept_in_the_type_of_the_model_or_as_asked(
    tmp_path: Path, stored: torch.dtype, fields: dict[str, str], kept: torch.dtype
) -> None:
    loaded: Any = load(write_tiny_model(tmp_path, dtype=stored), **fields)
    pool = loaded.engine._pool
    assert {states.dtype for states in (*pool.keys, *pool.values)} == {kept}
    block = 2 * 3 * 4 * 2 * 10  # K and V, layers, tokens, heads, head_dim
    assert loaded.capacity.kv_cache_bytes == 120 * block * kept.itemsize
