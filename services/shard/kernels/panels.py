"""How matrices lie in memory for the product kernels, which read what is written here.

A panel is as many rows as two vectors have floats; within it, what belongs to one column (to two
or four, with codes) lies together. What a part's last panel has in excess of its rows is zero.
Computes no product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

# Of a matrix that are in hand at a time, so that packing takes little memory beside the result.
_CHUNK_ELEMENTS = 1 << 21


@dataclass(frozen=True, slots=True)
class Panels:
    """Cuts matrices for a processor with `width` floats per vector.

    Attributes:
        multiplies_bfloat16: it does, by pairs of columns; others widen pairs of rows.
        sums_bytes: codes of 8 bits are multiplied by fours of columns; elsewhere by pairs.
    """

    width: int
    multiplies_bfloat16: bool = False
    sums_bytes: bool = False

    @property
    def height(self) -> int:
        """Rows of the matrix in one panel."""
        return 2 * self.width

    def targets(self, sizes: Sequence[int]) -> torch.Tensor:
        """int32 [panels, 4]: per panel the first row of its part, the part's rows, the panel's
        first row within it, and how many it has; parts begin with a panel of their own."""
        found, part_start = [], 0
        for size in sizes:
            found += [
                (part_start, size, start, min(self.height, size - start))
                for start in range(0, size, self.height)
            ]
            part_start += size
        return torch.tensor(found, dtype=torch.int32)

    def pack(
        self,
        parts: Sequence[torch.Tensor],
        arrange: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """All parts, one after the other, each [rows, ...], as [panels, ...].

        Args:
            arrange: `whole_rows` or a method below, which make panels of some rows of a part.
        """
        total = sum(-(-len(part) // self.height) for part in parts)
        packed, filled = torch.empty(0), 0
        for part in parts:
            step = max(1, _CHUNK_ELEMENTS // (part[0].numel() * self.height)) * self.height
            for start in range(0, len(part), step):
                piece = arrange(part[start : start + step])
                if not filled:
                    packed = piece.new_empty(total, *piece.shape[1:])
                packed[filled : filled + len(piece)] = piece
                filled += len(piece)
        return packed

    def whole_rows(self, values: torch.Tensor) -> torch.Tensor:
        """[rows, ...] → [panels, 2, width, ...]: row i of a panel is (i // width, i % width)."""
        filled = pad(values, (0, 0) * (values.dim() - 1) + (0, -len(values) % self.height))
        return filled.view(-1, 2, self.width, *values.shape[1:])

    def floats(self, matrix: torch.Tensor) -> torch.Tensor:
        """float32 [rows, columns] → [panels, columns, 2, width]; bfloat16 → [panels, columns,
        width, 2], so that one word has a row of either half, or [panels, pairs of columns, 2,
        width, 2], so that it has a row's pair."""
        if matrix.dtype is torch.float32:
            return self.whole_rows(matrix).permute(0, 3, 1, 2)
        if self.multiplies_bfloat16:
            return self._neighbours(pad(matrix, (0, -matrix.shape[1] % 2)), 2)
        return self.whole_rows(matrix).permute(0, 3, 2, 1)

    def codes_of_8(self, codes: torch.Tensor) -> torch.Tensor:
        """int8 [rows, columns] → [panels, pairs of columns, 2, width, 2], or [panels, fours of
        columns, 2, width, 4] without signs, 128 for 0; columns are filled up to whole fours."""
        filled = pad(codes, (0, -codes.shape[1] % 4))
        return (
            self._neighbours(filled ^ -128, 4) if self.sums_bytes else self._neighbours(filled, 2)
        )

    def codes_of_4(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 [rows, columns / 2], the even column in the low half → [panels, columns / 8, 2,
        width, 4]: of eight columns the first four are in the low halves."""
        pairs = codes.view(len(codes), -1, 4)
        low, high = pairs & 15, pairs >> 4
        eight = torch.stack((low, high), dim=-1).view(len(codes), -1, 2, 4)
        return self._neighbours((eight[:, :, 0] | eight[:, :, 1] << 4).flatten(1), 4)

    def group_scales(self, scales: torch.Tensor) -> torch.Tensor:
        """bfloat16 [rows, groups, 2] → [panels, groups, 2, width, 2]; what stands for 2 first is
        scale and zero, last the panel's halves."""
        return self.whole_rows(scales).permute(0, 3, 4, 2, 1)

    def rows(self, panels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """[n, columns]: rows of what `floats` or `codes_of_8` made the panels from, with the
        columns that filled them up."""
        panel, within = ids // self.height, ids % self.height
        half, lane = within // self.width, within % self.width
        if panels.dtype is torch.bfloat16 and not self.multiplies_bfloat16:
            return panels[panel, :, lane, half]
        found = panels[panel, :, half, lane].reshape(len(ids), -1)
        return found ^ -128 if self.sums_bytes and found.dtype is torch.int8 else found

    def _neighbours(self, matrix: torch.Tensor, count: int) -> torch.Tensor:
        """[rows, columns] → [panels, columns / count, 2, width, count]."""
        rows = self.whole_rows(matrix.view(len(matrix), -1, count))
        return rows.permute(0, 3, 1, 2, 4)
