"""Products with packed matrices against float64, and what a row must not depend on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from services.shard.kernels.library import Library
from services.shard.kernels.products import Packer
from services.shard.row_codes import Codes
from tests.compiled_kernels import with_byte_sums
from tests.unit.shard.conftest import SWITCH

FLOATS = [torch.float32, torch.bfloat16]
# Columns per scale of 4-bit codes; 0 is 8 bits, None floats.
GROUPS = {
    "float32": None,
    "bfloat16": None,
    "int8": 0,
    "int4-32": 32,
    "int4-64": 64,
    "int4-128": 128,
}
KINDS = list(GROUPS)
FEW_KINDS = ["float32", "bfloat16", "int8", "int4-32"]
UNIT = 2.0**-24


@dataclass(frozen=True)
class Part:
    """One part of a matrix, and in float64 what it means."""

    given: torch.Tensor | Codes
    values: torch.Tensor
    # What is summed in float32, at most, per unit of x: with groups, scales and zeros apart.
    sizes: torch.Tensor

    @property
    def is_codes(self) -> bool:
        return isinstance(self.given, Codes)

    @property
    def has_groups(self) -> bool:
        return isinstance(self.given, Codes) and self.given.group_size > 0


def _part(kind: str, height: int, width: int, seed: int = 0) -> Part:
    group = GROUPS[kind]
    weight = torch.randn(height, width, generator=torch.Generator().manual_seed(seed))
    if group is None:
        weight = weight.to(getattr(torch, kind))
        return Part(weight, weight.double(), weight.double().abs())
    codes = Codes.empty(height, width, group)
    assert codes.quantize_(weight)
    values = codes.dequantized().double()
    if codes.zeros is None:
        return Part(codes, values, values.abs())
    sizes = 8 * codes.scales.double() + codes.zeros.double().abs()
    return Part(codes, values, sizes.repeat_interleave(group, dim=1))


def _width(kind: str, width: int) -> int:
    """The same or a little wider: groups are whole."""
    return width + -width % (GROUPS[kind] or 1)


def _bound(packer: Packer, x: torch.Tensor, part: Part) -> torch.Tensor:
    """Sums in float32, one after the other (Higham, Accuracy and Stability, 3.1): n u Σ |x| |w|;
    with codes, half of the unit of each value of x, of which each 512 columns have their own, or
    each 32 with 8 bits."""
    rounding = (x.shape[1] + 4) * UNIT * (x.double().abs() @ part.sizes.T) + 1e-30
    if not part.is_codes:
        return rounding
    columns = x.shape[1]
    block, most = (32, 127) if part.has_groups or packer.sums_bytes else (512, 32767)
    blocks = pad(x.double().abs(), (0, -columns % block)).view(len(x), -1, block)
    units = (blocks.amax(dim=2) / most).repeat_interleave(block, dim=1)[:, :columns]
    return rounding * (1 + 1 / most) + units * 0.501 @ part.values.abs().T


def _wanted(x: torch.Tensor, part: Part) -> torch.Tensor:
    return x.double() @ part.values.T


def _read(packer: Packer, x: torch.Tensor, kind: str) -> torch.Tensor:
    """x as the product reads it: some processors multiply pairs of bfloat16."""
    return x.bfloat16() if kind == "bfloat16" and packer.rounds_bfloat16 else x


# A library that was named is tested alone.
CODE = ["this processor's"] if SWITCH in os.environ else ["this processor's", "bytes"]


@pytest.fixture(scope="module", params=CODE)
def packer(request: pytest.FixtureRequest, kernels: Library) -> Packer:
    """Of the code for this processor, and of that for one that sums products of bytes."""
    if request.param != "bytes":
        return Packer(kernels)
    packer = Packer(with_byte_sums())
    assert packer.sums_bytes
    return packer


@pytest.mark.parametrize("kind", KINDS)
@given(
    rows=st.integers(1, 30),
    height=st.integers(1, 70),
    width=st.integers(1, 1100),
    x_dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=25)
def test_product_is_that_of_float64_when_the_shape_is_odd(
    packer: Packer,
    kind: str,
    rows: int,
    height: int,
    width: int,
    x_dtype: torch.dtype,
    seed: int,
) -> None:
    part = _part(kind, height, _width(kind, width), seed)
    x = torch.randn(rows, _width(kind, width), generator=torch.Generator().manual_seed(seed + 1))
    x = x.to(x_dtype)
    got = packer.pack([part.given]).multiply(x, torch.float32)
    x = _read(packer, x, kind)
    assert ((got - _wanted(x, part)).abs() <= _bound(packer, x, part)).all()


@pytest.mark.parametrize("kind", FEW_KINDS)
@pytest.mark.parametrize("rows", [191, 192, 193, 450])
def test_product_is_that_of_float64_when_rows_come_in_blocks(
    packer: Packer, kind: str, rows: int
) -> None:
    part, bias = _part(kind, 203, _width(kind, 777)), torch.randn(203)
    x = torch.randn(rows, _width(kind, 777))
    got = packer.pack([part.given], [bias]).multiply(x)
    x = _read(packer, x, kind)
    wanted = _wanted(x, part) + bias.double()
    assert ((got - wanted).abs() <= _bound(packer, x, part) + 2 * UNIT * wanted.abs()).all()


@pytest.mark.parametrize("kind", ["int8", "int4-32"])
def test_small_values_keep_their_digits_beside_outliers(packer: Packer, kind: str) -> None:
    part = _part(kind, 50, 1536)
    x = torch.randn(9, 1536) * torch.logspace(-20, 20, 9)[:, None]
    x[:, 3] *= 1000
    got = packer.pack([part.given]).multiply(x)
    assert ((got - _wanted(x, part)).abs() <= _bound(packer, x, part)).all()


def test_sums_do_not_overflow_when_all_codes_and_activations_are_extreme(packer: Packer) -> None:
    codes = Codes(torch.full((16, 2048), -128, dtype=torch.int8), torch.ones(16))
    x = torch.full((7, 2048), -3.0)
    wanted = torch.full((7, 16), 2048 * 128 * 3.0)
    torch.testing.assert_close(packer.pack([codes]).multiply(x), wanted)


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_result_has_the_type_of_x_unless_another_is_asked_for(packer: Packer, kind: str) -> None:
    matrix = packer.pack([_part(kind, 37, 64).given], [torch.randn(37)])
    x = torch.randn(9, 64).bfloat16()
    exact = matrix.multiply(x, torch.float32)
    assert exact.dtype is torch.float32
    assert torch.equal(matrix.multiply(x), exact.bfloat16())
    assert torch.equal(matrix.multiply(x.float(), torch.bfloat16), exact.bfloat16())
    assert torch.equal(matrix.multiply(x.float()), exact)


@pytest.mark.parametrize("kind", FEW_KINDS)
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_parts_are_the_products_of_each_when_merged(packer: Packer, kind: str, rows: int) -> None:
    parts = [_part(kind, size, 160, size).given for size in (40, 1, 16, 33)]
    biases = [torch.randn(40).bfloat16(), None, torch.randn(16), None]
    merged = packer.pack(parts, biases)
    x = torch.randn(rows, 160)
    pairs = zip(parts, biases, strict=True)
    alone = [packer.pack([part], [bias]).multiply(x) for part, bias in pairs]
    assert torch.equal(merged.multiply(x), torch.cat(alone, dim=1))
    apart = merged.split(x)
    assert all(part.is_contiguous() for part in apart)
    for got, wanted in zip(apart, alone, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_gives_the_same_bits_in_any_batch_with_any_threads(
    packer: Packer, kind: str, num_threads: int
) -> None:
    width = _width(kind, 700)
    matrix = packer.pack([_part(kind, 333, width).given])
    x = torch.randn(230, width)
    torch.set_num_threads(1)
    together = matrix.multiply(x)
    torch.set_num_threads(num_threads)
    for num_rows in (*range(1, 15), 24, 32, 33, 193, 230):
        assert torch.equal(matrix.multiply(x[:num_rows]), together[:num_rows])
        assert torch.equal(matrix.multiply(x[-num_rows:]), together[-num_rows:])


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_x_may_lie_anywhere(packer: Packer, kind: str) -> None:
    matrix = packer.pack([_part(kind, 30, 64).given])
    wide = torch.randn(8, 120)
    tall = torch.randn(64, 8)
    for x in (wide[:, 7:71], wide[::2, :64], tall.T, wide[:1, :64].expand(4, 64)):
        assert torch.equal(matrix.multiply(x), matrix.multiply(x.clone().contiguous()))


@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_may_lie_anywhere(packer: Packer, dtype: torch.dtype) -> None:
    tall = torch.randn(64, 70).to(dtype)  # as GPT-2's, whose matrices are the other way round
    x = torch.randn(3, 64)
    assert torch.equal(
        packer.pack([tall.T]).multiply(x), packer.pack([tall.T.contiguous()]).multiply(x)
    )


@pytest.mark.parametrize("kind", FEW_KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 5, 66])
def test_neighbours_are_untouched_when_a_row_is_not_finite(
    packer: Packer, kind: str, value: float, place: int
) -> None:
    width = _width(kind, 67)
    matrix = packer.pack([_part(kind, 40, width).given])
    x = torch.randn(9, width)
    clean = matrix.multiply(x)
    x[4, place] = value
    got = matrix.multiply(x)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(got[others], clean[others])
    assert not torch.isfinite(got[4]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_gives_nothing(packer: Packer, kind: str) -> None:
    matrix = packer.pack([_part(kind, 5, 128).given, _part(kind, 2, 128).given])
    assert not matrix.multiply(torch.zeros(3, 128)).any()
    assert matrix.multiply(torch.empty(0, 128)).shape == (0, 7)
    assert [part.shape for part in matrix.split(torch.empty(0, 128))] == [(0, 5), (0, 2)]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_rows_of_the_matrix_are_those_that_were_packed(packer: Packer, kind: str) -> None:
    part = _part(kind, 75, 33)
    ids = torch.tensor([74, 0, 16, 8, 7, 15, 31, 0])
    got = packer.pack([part.given]).rows(ids)
    assert got.dtype is (torch.float32 if part.is_codes else part.given.dtype)
    assert torch.equal(got.double(), part.values[ids])


def test_packing_in_pieces_gives_the_same_matrix(
    packer: Packer, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 64)
    for kind in KINDS[:-1]:
        parts = [_part(kind, 100, 64).given, _part(kind, 70, 64).given]
        whole = packer.pack(parts).multiply(x)
        with monkeypatch.context() as patch:
            patch.setattr("services.shard.kernels.panels._CHUNK_ELEMENTS", 1)
            assert torch.equal(packer.pack(parts).multiply(x), whole)


@pytest.mark.parametrize(
    ("kind", "bytes_per_weight"),
    [("float32", 4), ("bfloat16", 2), ("int8", 1 + 4 / 512), ("int4-32", 0.5 + 4 / 32)],
)
def test_there_is_one_copy_of_the_weights(
    packer: Packer, kind: str, bytes_per_weight: float
) -> None:
    matrix = packer.pack([_part(kind, 64, 512).given])
    assert matrix.num_bytes == 64 * 512 * bytes_per_weight


def test_what_can_not_be_taken_is_refused(packer: Packer) -> None:
    matrix = packer.pack([torch.randn(5, 3), torch.randn(2, 3)])
    with pytest.raises(ValueError, match=r"shape \(2, 4\), not \[n, 3\]"):
        matrix.multiply(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        matrix.multiply(torch.randn(2, 3).double())
    with pytest.raises(ValueError, match="one part"):
        matrix.rows(torch.tensor([0]))
    with pytest.raises(ValueError, match="without groups"):
        packer.pack([_part("int4-32", 2, 64).given]).rows(torch.tensor([0]))
    with pytest.raises(ValueError, match=r"not of torch\.float16"):
        packer.pack([torch.randn(2, 2).half()])
    with pytest.raises(ValueError, match="same columns"):
        packer.pack([torch.randn(2, 2), torch.randn(2, 3)])
    with pytest.raises(ValueError, match=r"bfloat16"):
        packer.pack([torch.randn(2, 2), torch.randn(2, 2).bfloat16()])
    with pytest.raises(ValueError, match=r"bias .* has the shape \(3,\)"):
        packer.pack([torch.randn(2, 2)], [torch.randn(3)])
    with pytest.raises(ValueError, match="can't have 1 biases"):
        packer.pack([torch.randn(2, 2), torch.randn(2, 2)], [None])
    with pytest.raises(ValueError, match="all floats or all codes"):
        packer.pack([torch.randn(2, 64), _part("int8", 2, 64).given])
    with pytest.raises(ValueError, match=r"groups of \[0, 32\]"):
        packer.pack([_part("int8", 2, 64).given, _part("int4-32", 2, 64).given])
