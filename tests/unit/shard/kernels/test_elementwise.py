"""Norms, rotations and gates: float32 against float64, bfloat16 against transformers itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3 import modeling_phi3

from services.shard.kernels.elementwise import GATES, Elementwise
from services.shard.kernels.library import Library

_F32, _BF16 = torch.float32, torch.bfloat16
_widths = st.one_of(st.integers(1, 80), st.sampled_from([896, 2048]))
# transformers' module → (weight offset, rounds before the weight)
NORMS = {LlamaRMSNorm: (0.0, True), Gemma2RMSNorm: (1.0, False), Olmo2RMSNorm: (0.0, False)}


def _steps_apart(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How many bfloat16 values lie between them: 0 where they are equal."""
    ordered = []
    for values in (got, wanted):
        assert values.dtype == _BF16
        bits = values.contiguous().view(torch.int16).int()
        ordered.append(torch.where(bits < 0, -32768 - bits, bits))
    return (ordered[0] - ordered[1]).abs()


def _assert_rounded_alike(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Sums in another order may tip a value that lies between two; nearly none do."""
    apart = _steps_apart(got, wanted)
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.02


def _random(*size: int, seed: int = 0, dtype: torch.dtype = _F32) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), width=_widths, offset=st.sampled_from([0.0, 1.0]), add=st.booleans())
def test_norm_equals_float64_when_the_type_is_float32(
    kernels: Library, rows: int, width: int, offset: float, add: bool
) -> None:
    x, residual, weight = (
        _random(rows, width, seed=1) * 3,
        _random(rows, width, seed=2),
        _random(width),
    )
    total = x + residual if add else x
    wanted = total.double() / (total.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    wanted *= weight.double() + offset
    elementwise = Elementwise(kernels, _F32)
    if add:
        got, kept = elementwise.add_rms_norm(x, residual, weight, 1e-5, offset=offset)
        assert torch.equal(kept, total)
    else:
        got = elementwise.rms_norm(x, weight, 1e-5, offset=offset)
    # a factor and two products are rounded; a sum of 2,048 squares has lost no more
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("module", NORMS)
@pytest.mark.parametrize("width", [7, 64, 900])
def test_norm_rounds_as_transformers_does_when_the_type_is_bfloat16(
    kernels: Library, module: Callable[..., Any], width: int
) -> None:
    offset, round_first = NORMS[module]
    theirs = module(width, eps=1e-6).to(_BF16)
    theirs.weight.data = _random(width, seed=5, dtype=_BF16)
    x, residual = (_random(40, width, seed=seed, dtype=_BF16) for seed in (6, 7))
    elementwise = Elementwise(kernels, _BF16)
    rules = {"offset": offset, "round_first": round_first}
    weight = theirs.weight.data
    _assert_rounded_alike(elementwise.rms_norm(x, weight, 1e-6, **rules), theirs(x).detach())
    got, kept = elementwise.add_rms_norm(x, residual, weight, 1e-6, **rules)
    assert torch.equal(kept, x + residual)
    _assert_rounded_alike(got, theirs(x + residual).detach())


@pytest.mark.parametrize("dtype", [_F32, _BF16])
def test_norm_of_heads_reads_them_where_they_lie(kernels: Library, dtype: torch.dtype) -> None:
    wide = _random(1, 6, 9, 20, dtype=dtype)
    elementwise = Elementwise(kernels, dtype)
    weight = _random(20, seed=1, dtype=dtype)
    for x in (wide[:, :, 2:5], wide[0, :, 1:2], wide.transpose(1, 2), wide[..., ::1][0, 0, 1:]):
        wanted = elementwise.rms_norm(x.contiguous(), weight, 1e-6)
        assert torch.equal(elementwise.rms_norm(x, weight, 1e-6), wanted)


def _tables(module: Any, tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin as the model's rotary module has them, [tokens, width]."""
    angles = torch.arange(tokens)[:, None] * 10_000 ** -(torch.arange(width // 2) / (width // 2))
    if module is modeling_cohere:
        angles = angles.repeat_interleave(2, dim=-1)
    else:
        angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", [_F32, _BF16])
@pytest.mark.parametrize(
    ("module", "width", "head_dim"),
    [
        (modeling_llama, 64, 64),
        (modeling_llama, 10, 10),
        (modeling_phi3, 24, 32),
        (modeling_glm, 32, 64),
        (modeling_glm, 6, 12),
        (modeling_cohere, 10, 10),
        (modeling_cohere, 128, 128),
        (modeling_olmo2, 80, 80),
    ],
)
def test_rotation_equals_transformers_in_place(
    kernels: Library, module: Any, width: int, head_dim: int, dtype: torch.dtype
) -> None:
    tokens = 21
    cos, sin = _tables(module, tokens, width)
    if module is not modeling_olmo2:  # its tables stay float32
        cos, sin = cos.to(dtype), sin.to(dtype)
    # One product for queries and keys, as a merged layer gives it.
    both = _random(tokens, 7, head_dim, dtype=dtype)
    q, k = both[:, :5], both[:, 5:]
    wanted = module.apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None]
    )
    part = slice(0, None, 2) if module is modeling_cohere else slice(0, width // 2)
    tables = [table[:, part] for table in (cos, sin)]
    if module is modeling_cohere:  # computes in float32
        tables = [table.float() for table in tables]
    elementwise = Elementwise(kernels, dtype)
    for states in (q, k):
        elementwise.rotate(states, *tables, neighbours=module in (modeling_glm, modeling_cohere))
    for got, theirs in zip((q, k), wanted, strict=True):
        if dtype == _BF16:
            _assert_rounded_alike(got, theirs[0].transpose(0, 1))
        else:
            torch.testing.assert_close(got, theirs[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


def test_rotation_refuses_heads_that_are_no_neighbours(kernels: Library) -> None:
    states = _random(3, 8, 2).transpose(1, 2)
    with pytest.raises(ValueError, match="apart"):
        Elementwise(kernels, _F32).rotate(states, _random(3, 4), _random(3, 4))


def _activated(name: str, x: torch.Tensor) -> torch.Tensor:
    """In float64, by another way than the kernel's."""
    x = x.double()
    if name in ("silu", "swish"):
        return x * torch.sigmoid(x)
    if name == "gelu":
        return x * 0.5 * torch.erfc(-x / math.sqrt(2))
    # 0.5 * (1 + tanh(u)), which has no digits left far below 0
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 5), width=_widths, name=st.sampled_from(sorted(GATES)))
def test_gate_equals_float64_when_the_type_is_float32(
    kernels: Library, rows: int, width: int, name: str
) -> None:
    both = _random(1, rows, 2 * width, seed=width) * 4
    gate, up = both.chunk(2, dim=-1)
    wanted = _activated(name, gate) * up.double()
    elementwise = Elementwise(kernels, _F32)
    got = elementwise.gate(name, gate, up)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=2e-6)
    assert torch.equal(elementwise.gate(name, gate.contiguous(), up.contiguous()), got)


@pytest.mark.parametrize("name", sorted(GATES))
def test_gate_rounds_as_torch_does_when_the_type_is_bfloat16(kernels: Library, name: str) -> None:
    # Every bfloat16 value, but for those whose products may overflow.
    gate = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(_BF16)
    gate = gate[gate.abs() < 1e30][None]
    up = _random(*gate.shape, dtype=_BF16)
    got = Elementwise(kernels, _BF16).gate(name, gate, up)
    # torch.nn's own function, where transformers computes step by step in bfloat16
    activation = ACT2FN["gelu_pytorch_tanh" if name == "gelu_new" else name]
    active = activation(gate)
    # torch's gelu loses its digits where it is nearly 0; ours is the nearer there.
    clear = active.abs() > 1e-3
    _assert_rounded_alike(got[clear], (active * up)[clear])
    exact = _activated(name, gate) * up.double()
    torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=1e-30)


def test_gates_are_finite_or_nan_as_their_inputs_are(kernels: Library) -> None:
    gate = torch.tensor([[float("-inf"), -1e30, -200.0, 0.0, 200.0, 1e30, float("nan"), -90.0]])
    for name in GATES:
        got = Elementwise(kernels, _F32).gate(name, gate, torch.ones_like(gate))[0]
        assert got[6].isnan()
        assert torch.equal(got[1:6], torch.tensor([0.0, 0.0, 0.0, 200.0, 1e30]))
        assert abs(got[7]) < 1e-30


@pytest.mark.parametrize("dtype", [_F32, _BF16])
def test_bits_of_a_row_are_the_same_in_any_batch_and_number_of_threads(
    kernels: Library, dtype: torch.dtype
) -> None:
    elementwise = Elementwise(kernels, dtype)
    x, up = (_random(64, 1000, seed=seed, dtype=dtype) for seed in (1, 2))
    weight = _random(1000, dtype=dtype)
    cos, sin = (_random(64, 500, seed=seed, dtype=dtype) for seed in (3, 4))

    def all_of(part: slice) -> list[torch.Tensor]:
        turned = x[part].clone().unsqueeze(1)
        elementwise.rotate(turned, cos[part], sin[part])
        gates = [elementwise.gate(name, x[part], up[part]) for name in GATES]
        return [turned, elementwise.rms_norm(x[part], weight, 1e-6), *gates]

    torch.set_num_threads(1)
    together = all_of(slice(None))
    torch.set_num_threads(3)
    assert all(map(torch.equal, all_of(slice(None)), together))
    for row in (0, 13, 63):
        alone = all_of(slice(row, row + 1))
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone, together, strict=True))
