"""Decoder layers of random weights, packed for the kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from services.shard.attention import ScoreRules
from services.shard.kernels.layers import LayerParts, Norm
from services.shard.kernels.products import PackedMatrix, Packer
from services.shard.row_codes import Codes


@dataclass(frozen=True)
class LayerSize:
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int


def random_matrix(rows: int, columns: int, draw: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, columns, generator=draw) * columns**-0.5


def random_codes(rows: int, columns: int, draw: torch.Generator) -> Codes:
    codes = torch.randint(-127, 128, (rows, columns), generator=draw, dtype=torch.int8)
    return Codes(codes, torch.full((rows, 1), columns**-0.5 / 127))


def random_layer(
    packer: Packer,
    size: LayerSize,
    draw: torch.Generator,
    matrix: Callable[[int, int, torch.Generator], torch.Tensor | Codes] = random_matrix,
) -> LayerParts:
    """As Llama has it."""

    def norm() -> Norm:
        return Norm(1 + 0.1 * torch.randn(size.width, generator=draw), 1e-5, 0.0)

    def pack(columns: int, *rows: int) -> PackedMatrix:
        return packer.pack([matrix(count, columns, draw) for count in rows])

    dim, mixed = size.head_dim, size.heads * size.head_dim
    return LayerParts(
        norms=(norm(), None, norm(), None),
        head_norms=None,
        norm_whole=False,
        qkv=pack(size.width, mixed, size.kv_heads * dim, size.kv_heads * dim),
        out=pack(mixed, size.width),
        both=pack(size.width, size.hidden, size.hidden),
        down=pack(size.hidden, size.width),
        order=(0, 1, 2),
        head_dim=dim,
        neighbours=False,
        score_rules=ScoreRules(dim**-0.5),
        window=None,
        activation="silu",
        gate_first=True,
        multiplier=1.0,
    )
