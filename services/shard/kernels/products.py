"""Matrices packed once for the product kernels, and the products with them.

An element is summed over the columns in one order, whatever the batch, the threads and the width of
the processor's vectors: a row's result is bitwise the same alone and among others. ADR 23 has how,
and the measurements.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from services.shard.kernels.library import Library
from services.shard.kernels.panels import Panels
from services.shard.row_codes import Codes

_FLOATS = (torch.float32, torch.bfloat16)
# Of x and of the result: whether each is bfloat16.
_TYPES = {
    (x, out): (x is torch.bfloat16, out is torch.bfloat16) for x in _FLOATS for out in _FLOATS
}
# By the type of what is in the panels.
_KERNELS = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
    torch.uint8: "int4",
}
# Columns of x that become integers together, and with 8 bits in one unit: a group of a scale is
# some of the latter, and does not straddle the former.
_CODE_BLOCK, _BYTE_GROUP = 512, 32


class Product(ctypes.Structure):
    """`Product` of `cpp/panels.h`."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("num_columns", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("num_panels", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("scratch", ctypes.c_void_p),
        ("x_is_bfloat16", ctypes.c_int32),
        ("out_is_bfloat16", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix in the kernels' order.

    Attributes:
        sizes: rows of each part.
        num_columns: of the matrix; the panels have whole pairs of bfloat16, whole fours of codes.
        group_size: columns that share a scale, with 4 bits; else 0.
        weights: [panels, ...] of float32, bfloat16, int8, or uint8 for 4 bits.
        scales: of codes.
        bias: float32 [panels, 2, width].
    """

    sizes: tuple[int, ...]
    num_columns: int
    group_size: int
    weights: torch.Tensor
    scales: torch.Tensor | None
    bias: torch.Tensor | None


class Packer:
    """Packs matrices for the kernels of one library.

    Attributes:
        rounds_bfloat16: products with bfloat16 round x to it, too, as their processor multiplies
            pairs of them.
        sums_bytes: products with codes of 8 bits round x to 8 bits, as those of 4 bits do.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self.rounds_bfloat16 = bool(_ask(library, "product_rounds"))
        self.sums_bytes = bool(_ask(library, "product_bytes"))
        self._panels = Panels(_ask(library, "width"), self.rounds_bfloat16, self.sums_bytes)
        self._rows_at_once = _ask(library, "product_rows")

    def pack(
        self,
        parts: Sequence[torch.Tensor | Codes],
        biases: Sequence[torch.Tensor | None] = (),
    ) -> PackedMatrix:
        """One matrix from parts with the same columns, which may have a bias [rows] each.

        Args:
            parts: [rows, columns] of float32, or of bfloat16, or as codes; all alike.

        Raises:
            ValueError: there is no part, or types, columns or biases don't fit.
        """
        biases = list(biases) or [None] * len(parts)
        floats = [part for part in parts if isinstance(part, torch.Tensor)]
        codes = [part for part in parts if isinstance(part, Codes)]
        if not parts or (floats and codes):
            raise ValueError("parts are one or more, all floats or all codes")
        return self.adopt(
            self._pack_codes(codes, biases) if codes else self._pack_floats(floats, biases)
        )

    def adopt(self, packed: Packed) -> PackedMatrix:
        """A matrix that was packed before, by a packer for the same library."""
        return PackedMatrix(self._library, self._panels, packed, self._rows_at_once)

    def _pack_floats(
        self, parts: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
    ) -> Packed:
        if parts[0].dtype not in _FLOATS:
            raise ValueError(f"parts are of float32 or bfloat16, not of {parts[0].dtype}")
        sizes = _sizes(parts, biases)
        weights = self._panels.pack(parts, self._panels.floats)
        return Packed(sizes, parts[0].shape[1], 0, weights, None, self._bias(sizes, biases))

    def _pack_codes(self, parts: Sequence[Codes], biases: Sequence[torch.Tensor | None]) -> Packed:
        panels, group = self._panels, parts[0].group_size
        if any(part.group_size != group for part in parts) or (
            group and (_CODE_BLOCK % group or group % _BYTE_GROUP)
        ):
            raise ValueError(f"groups of {[part.group_size for part in parts]} columns")
        codes = [part.codes for part in parts]
        sizes, bias = _sizes(codes, biases), self._bias(_sizes(codes, biases), biases)
        if not group:
            weights = panels.pack(codes, panels.codes_of_8)
            scales = panels.pack([part.scales for part in parts], panels.whole_rows)
            return Packed(sizes, codes[0].shape[1], 0, weights, scales, bias)
        both = [
            torch.stack((part.scales, part.zeros), -1) for part in parts if part.zeros is not None
        ]
        weights = panels.pack(codes, panels.codes_of_4)
        scales = panels.pack(both, panels.group_scales)
        return Packed(sizes, 2 * codes[0].shape[1], group, weights, scales, bias)

    def _bias(
        self, sizes: Sequence[int], biases: Sequence[torch.Tensor | None]
    ) -> torch.Tensor | None:
        if all(bias is None for bias in biases):
            return None
        pairs = zip(biases, sizes, strict=True)
        filled = [torch.zeros(size) if bias is None else bias.float() for bias, size in pairs]
        return self._panels.pack(filled, self._panels.whole_rows)


class PackedMatrix:
    """A matrix [rows, columns] of one part or several; `x @ matrix.T + bias`.

    Several threads may use one at once. The products run on torch's threads.

    Attributes:
        rows_at_once: of x, that a product has in hand.
    """

    def __init__(self, library: Library, panels: Panels, packed: Packed, rows_at_once: int) -> None:
        """For `Packer`."""
        self.sizes = packed.sizes
        self.num_rows = sum(packed.sizes)
        self.num_columns = packed.num_columns
        self.packed = packed
        self._panels, self.rows_at_once = panels, rows_at_once
        self._targets = panels.targets(packed.sizes)
        name = f"multiply_{_KERNELS[packed.weights.dtype]}"
        self._address = library.address(name)
        self._kernel = library.function(name, ctypes.POINTER(Product))
        self._fixed = Product(
            num_columns=packed.num_columns,
            weights=packed.weights.data_ptr(),
            scales=None if packed.scales is None else packed.scales.data_ptr(),
            bias=None if packed.bias is None else packed.bias.data_ptr(),
            targets=self._targets.data_ptr(),
            num_panels=len(self._targets),
            group_size=packed.group_size,
        )

    @property
    def num_bytes(self) -> int:
        """What the matrix takes in memory, its bias included."""
        parts = (self.packed.weights, self.packed.scales, self.packed.bias)
        return sum(part.nbytes for part in parts if part is not None)

    def multiply(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[n, columns] → [n, rows] with all parts side by side.

        Args:
            x: float32 or bfloat16.
            dtype: of the result, one of both; x's by default.

        Raises:
            ValueError: type or shape can't be taken.
        """
        out = torch.empty(x.shape[0], self.num_rows, dtype=dtype or x.dtype)
        self._run(x, out, self.num_rows)
        return out

    def split(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """As `multiply`, but each part's result is a contiguous tensor [n, its rows]."""
        count = x.shape[0]
        out = torch.empty(count * self.num_rows, dtype=dtype or x.dtype)
        self._run(x, out, 0)
        found, start = [], 0
        for size in self.sizes:
            found.append(out.as_strided((count, size), (size, 1), start))
            start += count * size
        return found

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a matrix of one part that has no groups, [n] → [n, columns] in its type, or
        float32 with codes: an embedding that is tied to the output head needs no other table.

        Raises:
            ValueError: it has several parts, or groups.
        """
        packed = self.packed
        if len(self.sizes) != 1 or packed.group_size:
            raise ValueError("rows are of a matrix with one part and without groups")
        found = self._panels.rows(packed.weights, ids)[:, : self.num_columns]
        return found if packed.scales is None else found * packed.scales.flatten()[ids, None]

    def described(self) -> tuple[Product, int]:
        """For other kernels: a product without what a step brings, and the address of its kernel.
        Both are good as long as the matrix is there."""
        return Product.from_buffer_copy(self._fixed), self._address

    def scratch_size(self, num_rows: int) -> int:
        """Floats that a product with that many rows of x wants as room.

        A word per value, or with codes half of one and what belongs to blocks and groups.
        """
        return min(num_rows, self.rows_at_once) * (self.num_columns + 4)

    def _run(self, x: torch.Tensor, out: torch.Tensor, out_stride: int) -> None:
        shape, types = x.shape, (x.dtype, out.dtype)
        if types not in _TYPES:
            raise ValueError(f"products take float32 and bfloat16, not {x.dtype} to {out.dtype}")
        if len(shape) != 2 or shape[1] != self.num_columns:
            raise ValueError(f"x has the shape {tuple(shape)}, not [n, {self.num_columns}]")
        stride, inner = x.stride()
        if inner != 1:
            x = x.contiguous()
            stride = self.num_columns
        scratch = torch.empty(self.scratch_size(shape[0]))
        product = Product.from_buffer_copy(self._fixed)
        product.x, product.x_stride, product.num_rows = x.data_ptr(), stride, shape[0]
        product.out, product.out_stride = out.data_ptr(), out_stride
        product.scratch = scratch.data_ptr()
        product.x_is_bfloat16, product.out_is_bfloat16 = _TYPES[types]
        product.num_threads = torch.get_num_threads()
        self._kernel(product)


def _ask(library: Library, name: str) -> int:
    answer = ctypes.c_int32()
    library.function(name, ctypes.POINTER(ctypes.c_int32))(answer)
    return answer.value


def _sizes(parts: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> tuple[int, ...]:
    """Rows of each part. Raises ValueError where parts and biases don't go together."""
    shapes = [tuple(part.shape) for part in parts]
    if len({part.dtype for part in parts}) != 1:
        raise ValueError(f"parts are of {[part.dtype for part in parts]}")
    if any(len(shape) != 2 or 0 in shape or shape[1] != shapes[0][1] for shape in shapes):
        raise ValueError(f"parts are matrices with the same columns, not of {shapes}")
    if len(biases) != len(parts):
        raise ValueError(f"{len(parts)} parts can't have {len(biases)} biases")
    for shape, bias in zip(shapes, biases, strict=True):
        if bias is not None and tuple(bias.shape) != shape[:1]:
            raise ValueError(f"the bias of a part {shape} has the shape {tuple(bias.shape)}")
    return tuple(shape[0] for shape in shapes)
