"""Every supported architecture, quantized: it computes what transformers does with the values that
the codes stand for, in steps of any mix, and stays close to the plain model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.shard.quantize import quantize
from tests.architectures import ARCHITECTURES, VARIANTS, VOCAB_SIZE
from tests.compiled_kernels import kernels_sum_bytes, needs_kernels
from tests.tiny_models import write_tiny_model
from tests.unit.shard.quantized_models import load, mixed_logits, oracle, wide_fields

# Of the logits' spread. Against the oracle only activations are rounded: by the kernels to 16 bits
# of the largest of 512 or to 8 of the largest of 32; by torch to 14 bits of a row's largest with
# int8, to bfloat16's 8 bits at each product with int4. Where the oracle rounds to bytes, too, most
# are equal but for float32; a value that falls to the other side of a half changes what follows it.
OF_16_BITS, OF_8_BITS = 1e-3, 0.1
OF_TORCH = {"int8": 4e-3, "int4": 0.06}
# Mean divergence in nats from the plain model, twice the largest measured. Random weights have no
# redundancy, and a router of random weights turns to other experts: real models lose far less (the
# demo model 0.0002 with int4).
MAX_KL = {"int8": 0.02, "int4": 1.5}
MAX_KL_OF_EXPERTS = {"int8": 0.13, "int4": 2.3}
# What differs between the others is no matrix.
CHOSEN = (
    *ARCHITECTURES,
    "llama biases",
    "phi3 longrope with short and long sequences in one batch",
)


@pytest.fixture(params=["int8", "int4"])
def scheme(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=[pytest.param("auto", marks=needs_kernels), "off"])
def setting(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def _sequences(seed: str) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in (70, 41, 33, 7, 1)]


def _rounded(setting: str) -> tuple[str, ...]:
    """Of which schemes the products round what they are given to bytes."""
    if setting == "off":
        return ()
    return ("int4", "int8") if kernels_sum_bytes() else ("int4",)


def _rounding(setting: str, scheme: str) -> float:
    if setting == "off":
        return OF_TORCH[scheme]
    return OF_8_BITS if scheme in _rounded(setting) else OF_16_BITS


def _spread(logits: torch.Tensor) -> float:
    return float(logits.std())


@pytest.mark.parametrize("variant", CHOSEN)
def test_logits_equal_transformers_with_the_values_of_the_codes(
    variant: str, setting: str, scheme: str, tmp_path: Path
) -> None:
    model_type = VARIANTS[variant].model_type
    plain = write_tiny_model(tmp_path / "plain", model_type, **wide_fields(variant))
    quantize(str(plain), tmp_path / "quantized", scheme)
    loaded = load(plain, setting, quantize=scheme)
    wanted_model = oracle(plain, tmp_path / "quantized", rounded=_rounded(setting))
    plain_model = AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager").eval()
    assert loaded.manifest.num_parameters == plain_model.num_parameters()
    sequences = _sequences(variant)
    with torch.inference_mode():
        wanted = [wanted_model(torch.tensor([tokens])).logits[0] for tokens in sequences]
        floats = [plain_model(torch.tensor([tokens])).logits[0] for tokens in sequences]
    got = mixed_logits(loaded, sequences, random.Random(variant))
    differences, divergences, agreed = [], [], 0
    for (i, position), logits in got.items():
        expected, original = wanted[i][position], floats[i][position].log_softmax(-1)
        differences.append(float((logits - expected).abs().max()) / _spread(expected))
        divergence = original.exp() * (original - logits.log_softmax(-1))
        divergences.append(float(divergence.sum()))
        agreed += int(logits.argmax() == original.argmax())
    kl = sum(divergences) / len(divergences)
    worst, bound = max(differences), _rounding(setting, scheme)
    print(f"{variant} {scheme}: worst {worst:.5f} kl {kl:.5f} agree {agreed / len(got):.2f}")
    assert worst < bound
    if bound == OF_8_BITS:
        num_equal = sum(difference < OF_16_BITS for difference in differences)
        assert num_equal >= 0.1 * len(differences)
    bounds = MAX_KL_OF_EXPERTS if model_type in ("mixtral", "qwen3_moe") else MAX_KL
    assert kl < bounds[scheme]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_moe", "gemma3_text"])
def test_chunks_and_neighbours_change_nothing(
    model_type: str, setting: str, scheme: str, tmp_path: Path
) -> None:
    plain = write_tiny_model(tmp_path, model_type, **wide_fields(model_type))
    loaded: Any = load(plain, setting, quantize=scheme)
    sequences = _sequences(model_type)
    mixed = mixed_logits(loaded, sequences, random.Random(1))
    worst = 0.0
    for i, tokens in enumerate(sequences):
        alone = mixed_logits(loaded, [tokens], random.Random(i + 2))
        for (_, position), logits in alone.items():
            other = mixed.get((i, position))
            if other is not None:
                worst = max(worst, float((logits - other).abs().max()) / _spread(logits))
    print(f"{model_type} {scheme}: {worst:.6f}")
    assert worst < _rounding(setting, scheme)
