"""Whole decoder layers as one call: `cpp/layer.cpp` with what layers and steps are made of."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from services.shard.attention import ScoreRules
from services.shard.kernels.elementwise import GATES
from services.shard.kernels.library import Library
from services.shard.kernels.paged import PagedRows
from services.shard.kernels.products import PackedMatrix, Product

_POINTER, _INT, _FLAG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("eps", _FLOAT), ("offset", _FLOAT))


class _Matrix(ctypes.Structure):
    _fields_ = (("product", Product), ("multiply", _POINTER), ("num_rows", _INT))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Norm) for name in ("before_attention", "after_attention")),
        *((name, _Norm) for name in ("before_mlp", "after_mlp", "query_norm", "key_norm")),
        *((name, _Matrix) for name in ("qkv", "out", "both", "down")),
        *((name, _POINTER) for name in ("gate", "write_kv", "attend")),
        ("starts", _INT * 3),
        *((name, _INT) for name in ("num_heads", "num_kv_heads", "head_dim", "window")),
        *((name, _POINTER) for name in ("sinks", "keys", "values")),
        *((name, _FLOAT) for name in ("scale", "softcap", "multiplier")),
        *((name, _FLAG) for name in ("neighbours", "norm_whole", "gate_first")),
    )


_TABLES = ("tables", "query_lens", "context_lens", "slots", "cos", "sin")
_ROOM = ("normed", "projected", "mixed", "both", "hidden", "scratch")


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in (*_TABLES, *_ROOM)),
        *((name, _INT) for name in ("table_stride", "num_rows", "block_size")),
        *((name, _INT) for name in ("num_tokens", "cos_stride", "pairs")),
        ("num_threads", _FLAG),
    )


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm's weight [width], which counts as weight + offset."""

    weight: torch.Tensor
    eps: float
    offset: float


@dataclass(frozen=True, slots=True)
class LayerParts:
    """A decoder layer: x + m * after(attention(before(x))), and then the same with the MLP.

    Attributes:
        norms: before and after the attention, before and after the MLP.
        head_norms: of queries and keys, over each head or, if `norm_whole`, over all together.
        qkv: of three parts, which are q, k and v in the given `order`.
        both: gate and up; the gate first if `gate_first`.
        multiplier: m.
        neighbours: see Elementwise.rotate.
    """

    norms: tuple[Norm | None, Norm | None, Norm | None, Norm | None]
    head_norms: tuple[Norm, Norm] | None
    norm_whole: bool
    qkv: PackedMatrix
    out: PackedMatrix
    both: PackedMatrix
    down: PackedMatrix
    order: tuple[int, int, int]
    head_dim: int
    neighbours: bool
    score_rules: ScoreRules
    window: int | None
    activation: str
    gate_first: bool
    multiplier: float


class Room:
    """Memory that the layers of one model use in turn; grows with the largest step."""

    def __init__(self) -> None:
        self._held = torch.empty(0)

    def take(self, sizes: list[int]) -> list[int]:
        """Addresses of so many floats each, good until the next call."""
        if self._held.numel() < sum(sizes):
            self._held = torch.empty(sum(sizes))
        addresses, at = [], self._held.data_ptr()
        for size in sizes:
            addresses.append(at)
            at += size * self._held.itemsize
        return addresses


class LayerKernel:
    """One layer of a model in float32, over a pool of any type that PagedAttention takes."""

    def __init__(self, library: Library, parts: LayerParts, room: Room) -> None:
        self._call: Callable[..., None] = library.function(
            "layer", *(ctypes.POINTER(kind) for kind in (_Layer, _Step)), *(_POINTER,) * 3
        )
        self._library, self._parts, self._room = library, parts, room
        sinks = parts.score_rules.sinks
        # what the addresses below belong to
        self._sinks = None if sinks is None else sinks.float().contiguous()
        self._layer = _describe(library, parts, self._sinks)
        self._pool_dtype: torch.dtype | None = None

    def run(
        self,
        x: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        pools: tuple[torch.Tensor, torch.Tensor],
        rows: PagedRows,
        token_slots: torch.Tensor,
    ) -> torch.Tensor:
        """[tokens, width], contiguous → the same.

        Args:
            tables: cos and sin, float32 [tokens, pairs], rows contiguous.
            pools: K and V of this layer, as of PagedAttention.attend.
            token_slots: int64 [tokens]: where each token's K and V go.
        """
        cos, sin = tables
        num_tokens, width = x.shape
        block_tables, table_stride, query_lens, context_lens, num_rows = rows.arguments
        step = _Step(
            tables=block_tables,
            query_lens=query_lens,
            context_lens=context_lens,
            slots=token_slots.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            table_stride=table_stride,
            num_rows=num_rows,
            block_size=pools[0].shape[1],
            num_tokens=num_tokens,
            cos_stride=cos.stride(0),
            pairs=cos.shape[1],
            num_threads=torch.get_num_threads(),
        )
        added, *room = self._room.take(self._sizes(num_tokens, width))
        for name, address in zip(_ROOM, room, strict=True):
            setattr(step, name, address)
        if pools[0].dtype is not self._pool_dtype:
            self._take_pools_of(pools[0].dtype)
        layer = self._layer
        layer.keys, layer.values = pools[0].data_ptr(), pools[1].data_ptr()
        out = torch.empty_like(x)
        self._call(layer, step, x.data_ptr(), added, out.data_ptr())
        return out

    def _take_pools_of(self, dtype: torch.dtype) -> None:
        name = str(dtype).removeprefix("torch.")
        self._layer.write_kv = self._library.address(f"write_kv_{name}")
        self._layer.attend = self._library.address(f"paged_attention_{name}")
        self._pool_dtype = dtype

    def _sizes(self, num_tokens: int, width: int) -> list[int]:
        """In floats: what is added, then in the order of _ROOM."""
        parts = self._parts
        matrices = (parts.qkv, parts.out, parts.both, parts.down)
        return [
            num_tokens * width,
            num_tokens * width,
            num_tokens * parts.qkv.num_rows,
            num_tokens * parts.out.num_columns,
            num_tokens * parts.both.num_rows,
            num_tokens * parts.down.num_columns,
            max(matrix.scratch_size(num_tokens) for matrix in matrices),
        ]


def _describe(library: Library, parts: LayerParts, sinks: torch.Tensor | None) -> _Layer:
    layer = _Layer(
        gate=library.address(f"{GATES[parts.activation]}_float32"),
        head_dim=parts.head_dim,
        window=parts.window or 0,
        sinks=None if sinks is None else sinks.data_ptr(),
        scale=parts.score_rules.scale,
        softcap=parts.score_rules.softcap or 0.0,
        multiplier=parts.multiplier,
        neighbours=parts.neighbours,
        norm_whole=parts.norm_whole,
        gate_first=parts.gate_first,
    )
    names = ("before_attention", "after_attention", "before_mlp", "after_mlp")
    norms: dict[str, Any] = dict(zip(names, parts.norms, strict=True))
    norms.update(zip(("query_norm", "key_norm"), parts.head_norms or (None, None), strict=True))
    for name, norm in norms.items():
        if norm is not None:
            setattr(layer, name, _Norm(norm.weight.data_ptr(), norm.eps, norm.offset))
    for name in ("qkv", "out", "both", "down"):
        matrix: PackedMatrix = getattr(parts, name)
        setattr(layer, name, _Matrix(*matrix.described(), matrix.num_rows))
    sizes = parts.qkv.sizes
    for i, part in enumerate(parts.order):
        layer.starts[i] = sum(sizes[:part])
    layer.num_heads = sizes[parts.order[0]] // parts.head_dim
    layer.num_kv_heads = sizes[parts.order[1]] // parts.head_dim
    return layer
