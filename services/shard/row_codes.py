"""Matrices as integer codes, row by row: 8 bits with a scale per row, 4 with a scale and a zero
point per group of columns. A row's codes depend on that row alone. Computes no product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Largest value of a code, so that 0 has one and both signs reach as far.
MAX_CODE = 127
_MID_CODE = 8
_CHUNK_ELEMENTS = 1 << 20  # of float32 in hand at a time: they stay in the CPU cache, too
_SMALLEST_SCALE = 1e-30


@dataclass(frozen=True, slots=True)
class Codes:
    """Rows of a matrix.

    Attributes:
        codes: int8 [rows, columns]; or uint8 [rows, columns / 2], the even column in the low half.
        scales: float32 [rows]; or bfloat16 [rows, columns / group].
        zeros: bfloat16 [rows, columns / group], what code 8 means; None with 8 bits.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    @staticmethod
    def empty(num_rows: int, num_columns: int, group_size: int) -> Codes:
        """For rows to come; `group_size` 0 means 8 bits."""
        if not group_size:
            codes = torch.empty(num_rows, num_columns, dtype=torch.int8)
            return Codes(codes, torch.empty(num_rows, dtype=torch.float32))
        shape = (num_rows, num_columns // group_size)
        codes = torch.empty(num_rows, num_columns // 2, dtype=torch.uint8)
        scales, zeros = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(2))
        return Codes(codes, scales, zeros)

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts())

    @property
    def group_size(self) -> int:
        return 0 if self.zeros is None else 2 * self.codes.shape[1] // self.zeros.shape[1]

    def parts(self) -> tuple[torch.Tensor, ...]:
        """Codes, scales, and zeros where there are any."""
        return (self.codes, self.scales) + (() if self.zeros is None else (self.zeros,))

    def rows(self, start: int, end: int) -> Codes:
        """A view of some rows."""
        zeros = None if self.zeros is None else self.zeros[start:end]
        return Codes(self.codes[start:end], self.scales[start:end], zeros)

    def copy_(self, other: Codes) -> None:
        """Takes over another's values."""
        for own, theirs in zip(self.parts(), other.parts(), strict=True):
            own.copy_(theirs)

    def equal(self, other: Codes) -> bool:
        """Whether both mean the same matrix, bit for bit."""
        pairs = zip(self.parts(), other.parts(), strict=True)
        return all(torch.equal(own, theirs) for own, theirs in pairs)

    def quantize_(self, matrix: torch.Tensor) -> bool:
        """Fills all rows from a float matrix [rows, columns]; False where a value is not finite.

        Large matrices are cast piece by piece: a second copy in float32 is never there.
        """
        finite = True
        for start, end in _pieces(*matrix.shape):
            values = matrix[start:end].to(torch.float32)
            if self.zeros is None:
                _quantize_rows(values, self.rows(start, end))
            else:
                _quantize_groups(values, self.rows(start, end), self.group_size)
            finite = finite and bool(torch.isfinite(values.sum()))
        return finite

    def dequantized(self) -> torch.Tensor:
        """float32 [rows, columns]."""
        if self.zeros is None:
            return self.codes.float() * self.scales[:, None]
        groups = self.nibbles().view(len(self.codes), -1, self.group_size).float() - _MID_CODE
        values = groups * self.scales[..., None].float() + self.zeros[..., None].float()
        return values.view(len(self.codes), -1)

    def nibbles(self) -> torch.Tensor:
        """uint8 [rows, columns], 0 to 15: the codes of 4 bits, one per byte."""
        return torch.stack((self.codes & 0xF, self.codes >> 4), dim=-1).view(len(self.codes), -1)


def _quantize_rows(values: torch.Tensor, out: Codes) -> None:
    scales = (values.abs().amax(dim=1) / MAX_CODE).clamp_min_(_SMALLEST_SCALE)
    out.scales.copy_(scales)
    out.codes.copy_(values.div(scales[:, None]).round_().clamp_(-MAX_CODE, MAX_CODE))


def _quantize_groups(values: torch.Tensor, out: Codes, group_size: int) -> None:
    """From the least to the greatest value of each group. Scales are rounded to what is stored
    first: the codes then make up for it."""
    assert out.zeros is not None
    groups = values.view(len(values), -1, group_size)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    out.scales.copy_(((high - low) / 15).clamp_min_(_SMALLEST_SCALE))
    scales = out.scales.float()
    out.zeros.copy_(low + _MID_CODE * scales)
    codes = (groups - out.zeros.float()[..., None]).div_(scales[..., None])
    codes = codes.round_().add_(_MID_CODE).clamp_(0, 15).to(torch.uint8).view(values.shape)
    out.codes.copy_(codes[:, 0::2] | (codes[:, 1::2] << 4))


def _pieces(num_rows: int, num_columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_ELEMENTS // max(1, num_columns))
    for start in range(0, num_rows, step):
        yield start, min(num_rows, start + step)
