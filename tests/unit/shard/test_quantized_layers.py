"""Codes and the kernels that compute with them, against float64, row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.shard import quantized_layers, row_codes
from services.shard.quantized_layers import Int4Matrix, Int8Matrix, takes_int4
from services.shard.row_codes import Codes

GROUP = 32


def _codes(matrix: torch.Tensor, group_size: int) -> Codes:
    codes = Codes.empty(*matrix.shape, group_size)
    assert codes.quantize_(matrix)
    return codes


@given(st.integers(1, 6), st.integers(1, 3), st.sampled_from([0, GROUP]), st.integers(0, 99))
@settings(deadline=None)
def test_codes_are_within_half_a_step_of_every_weight(
    rows: int, groups: int, group_size: int, seed: int
) -> None:
    matrix = torch.randn(rows, groups * GROUP, generator=torch.Generator().manual_seed(seed))
    codes = _codes(matrix, group_size)
    scales = codes.scales.float()
    if group_size:
        # the zero point is stored with 8 bits: up to 1/32 of a step more
        steps = scales.repeat_interleave(GROUP, dim=1) * (0.5 + 1 / 16)
    else:
        steps = scales[:, None].expand_as(matrix) * 0.5001
    assert ((codes.dequantized() - matrix).abs() <= steps).all()


@pytest.mark.parametrize("group_size", [0, GROUP])
def test_codes_are_the_same_when_a_matrix_comes_in_pieces(
    group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.randn(48, 96)
    whole = _codes(matrix, group_size)
    monkeypatch.setattr(row_codes, "_CHUNK_ELEMENTS", 500)
    pieces = Codes.empty(48, 96, group_size)
    for start, end in ((30, 48), (0, 30)):
        assert pieces.rows(start, end).quantize_(matrix[start:end])
    assert pieces.equal(whole)


@pytest.mark.parametrize("group_size", [0, GROUP])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_codes_say_so_when_a_weight_is_not_finite(group_size: int, value: float) -> None:
    matrix = torch.randn(3, 64)
    matrix[1, 40] = value
    assert not Codes.empty(3, 64, group_size).quantize_(matrix)


@pytest.mark.parametrize("group_size", [0, GROUP])
def test_zero_rows_stay_zero(group_size: int) -> None:
    assert not _codes(torch.zeros(2, 64), group_size).dequantized().any()


def _rows(num_rows: int, width: int) -> torch.Tensor:
    """Of very different sizes, with the outliers that real activations have."""
    rows = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(num_rows))
    rows[:, 3] *= 40
    return rows * torch.logspace(-3, 3, num_rows)[:, None]


@pytest.mark.parametrize(("height", "width"), [(96, 160), (37, 10), (1, 1), (300, 64)])
def test_int8_product_is_exact_to_the_digits_of_the_activations(height: int, width: int) -> None:
    codes = _codes(torch.randn(height, width), 0)
    rows = _rows(9, width) if width > 3 else torch.randn(9, width)
    got = Int8Matrix(codes).multiply(rows).double()
    weights = codes.dequantized().double()
    # half of the low digit's unit in each of the products
    step = rows.abs().amax(dim=1, keepdim=True).double() / (63 * 126) / 2
    bound = step * weights.abs().sum(dim=1) * 1.01
    assert ((got - rows.double() @ weights.t()).abs() <= bound + 1e-6).all()


def test_int8_product_is_exact_when_all_codes_and_digits_are_extreme() -> None:
    matrix = torch.ones(32, 512)  # pairs of products that overflow 16 bits, were digits of 8 bits
    matrix[1::2] = -1
    got = Int8Matrix(_codes(matrix, 0)).multiply(torch.ones(3, 512))
    torch.testing.assert_close(got, 512 * matrix[:, 0].expand(3, 32))


def test_int4_product_is_exact_to_bfloat16() -> None:
    codes = _codes(torch.randn(64, 96), GROUP)
    rows = torch.randn(9, 96).bfloat16().float()
    wanted = rows.double() @ codes.dequantized().double().t()
    got = Int4Matrix(codes).multiply(rows).double()
    # the result's rounding, and a sum of 96 products in float32
    assert ((got - wanted).abs() <= wanted.abs() / 256 + 1e-4).all()


@pytest.mark.parametrize("group_size", [0, GROUP])
@pytest.mark.parametrize("num_rows", [2, 5, 33])
def test_a_row_gives_the_same_bits_when_it_is_alone(group_size: int, num_rows: int) -> None:
    matrix = quantized_layers.pack(_codes(torch.randn(96, 192), group_size))
    rows = _rows(num_rows, 192)
    together = matrix.multiply(rows)
    for i in range(num_rows):
        assert torch.equal(matrix.multiply(rows[i : i + 1])[0], together[i])


@pytest.mark.parametrize("group_size", [0, GROUP])
@pytest.mark.parametrize("shape", [(1, 0), (1, 3), (2, 2)])
def test_layer_keeps_the_shape_of_its_input_also_when_there_is_no_row(
    group_size: int, shape: tuple[int, int]
) -> None:
    layer = quantized_layers.QuantizedLinear(torch.nn.Linear(192, 96, bias=False))
    layer.accept("weight", _codes(torch.randn(96, 192), group_size))
    layer.pack()
    # no row: what the output layer gets in a step that ends no prompt
    assert layer(torch.randn(*shape, 192)).shape == (*shape, 96)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_neighbours_are_untouched_when_a_row_is_not_finite(value: float) -> None:
    matrix = Int8Matrix(_codes(torch.randn(16, 64), 0))
    rows = torch.randn(3, 64)
    clean = matrix.multiply(rows)
    rows[1, 5] = value
    got = matrix.multiply(rows)
    assert torch.equal(got[0::2], clean[0::2])
    assert not torch.isfinite(got[1]).any()


def test_packing_in_pieces_gives_the_same_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = _codes(torch.randn(208, 64), GROUP)
    rows = torch.randn(3, 64)
    whole = Int4Matrix(codes).multiply(rows)
    monkeypatch.setattr(quantized_layers, "_PACK_ELEMENTS", 1)
    assert torch.equal(Int4Matrix(codes).multiply(rows), whole)


@pytest.mark.parametrize(
    ("height", "width", "takes"), [(16, 32, True), (16, 48, False), (24, 64, False)]
)
def test_int4_takes_what_its_kernel_takes(height: int, width: int, takes: bool) -> None:
    assert takes_int4(height, width, GROUP) == takes
