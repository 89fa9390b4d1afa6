"""Decoder layers, one or many, as one call: `cpp/layer.cpp`, and what layers and steps are."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from services.shard.attention import ScoreRules
from services.shard.kernels.elementwise import GATES
from services.shard.kernels.library import Library
from services.shard.kernels.paged import NeededTokens, PagedRows
from services.shard.kernels.products import PackedMatrix, Product
from services.shard.kv_pool import KvPool

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


class _Needed(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("tokens", *_TABLES[:3], "states")),
        *((name, _INT) for name in ("count", "table_stride")),
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


class LayersKernel:
    """Layers of a model in float32, one after another, over pools of any type that PagedAttention
    takes.

    Args:
        layers: by each one's number in the pool, in the order in which they run.
    """

    def __init__(self, library: Library, layers: Mapping[int, LayerParts], room: Room) -> None:
        self._call = library.function("layers", *(_POINTER,) * 2, _INT, *(_POINTER,) * 3)
        self._library, self._room = library, room
        self._numbers, self._parts = list(layers), list(layers.values())
        # what the addresses below belong to
        sinks = [parts.score_rules.sinks for parts in self._parts]
        self._sinks = [None if one is None else one.float().contiguous() for one in sinks]
        described = map(_describe, itertools.repeat(library), self._parts, self._sinks)
        self._layers = (_Layer * len(layers))(*described)
        self._pool: KvPool | None = None
        each = [(one.qkv, one.out, one.both, one.down) for one in self._parts]
        self._widest = {matrix.num_columns: matrix for four in each for matrix in four}.values()
        wanted = ((a.num_rows, b.num_columns, c.num_rows, d.num_columns) for a, b, c, d in each)
        self._per_token = [max(sizes) for sizes in zip(*wanted, strict=True)]

    def run(
        self,
        x: torch.Tensor,
        tables: Sequence[tuple[torch.Tensor, torch.Tensor]],
        pool: KvPool,
        rows: PagedRows,
        token_slots: torch.Tensor,
        needed: NeededTokens | None = None,
    ) -> torch.Tensor:
        """[tokens, width] → the same.

        Args:
            tables: of each layer cos and sin, float32 [tokens, pairs], rows contiguous.
            token_slots: int64 [tokens]: where each token's K and V go.
            needed: None: all. Of others the last layer computes K and V alone; they come out as
                they went into it, or with a NaN where their K or V is no finite number.
        """
        if pool is not self._pool:
            self._take(pool)
        num_tokens, width = x.shape
        num_needed = 0 if needed is None else len(needed.tokens)
        kept, added, *room = self._room.take([num_needed * width, *self._sizes(num_tokens, width)])
        block_tables, table_stride, query_lens, context_lens, num_rows = rows.arguments
        step = _Step(
            block_tables,
            query_lens,
            context_lens,
            token_slots.data_ptr(),
            None,
            None,
            *room,
            table_stride=table_stride,
            num_rows=num_rows,
            block_size=pool.keys[0].shape[1],
            num_tokens=num_tokens,
            num_threads=torch.get_num_threads(),
        )
        distinct = {id(pair): pair for pair in tables}
        steps = {number: _with_tables(step, *pair) for number, pair in distinct.items()}
        addresses = [ctypes.addressof(steps[id(pair)]) for pair in tables]
        each = (_POINTER * len(addresses))(*addresses)
        out = x.clone(memory_format=torch.contiguous_format)
        last = None if needed is None else ctypes.byref(_describe_needed(needed, kept))
        self._call(self._layers, each, len(addresses), last, out.data_ptr(), added)
        return out

    def _take(self, pool: KvPool) -> None:
        """Addresses of the pool's tensors, which live as long as it is known here."""
        name = str(pool.keys[0].dtype).removeprefix("torch.")
        write, attend = (
            self._library.address(f"{function}_{name}")
            for function in ("write_kv", "paged_attention")
        )
        for layer, number in zip(self._layers, self._numbers, strict=True):
            layer.write_kv, layer.attend = write, attend
            layer.keys = pool.keys[number].data_ptr()
            layer.values = pool.values[number].data_ptr()
        self._pool = pool

    def _sizes(self, num_tokens: int, width: int) -> list[int]:
        """In floats, what the largest layer wants: what is added, then in the order of _ROOM."""
        scratch = max(matrix.scratch_size(num_tokens) for matrix in self._widest)
        projected, mixed, *of_mlp = self._per_token
        at_once = min(num_tokens, self._parts[0].both.rows_at_once)
        return [
            *(num_tokens * size for size in (width, width, projected, mixed)),
            *(at_once * size for size in of_mlp),
            scratch,
        ]


def _with_tables(step: _Step, cos: torch.Tensor, sin: torch.Tensor) -> _Step:
    own = _Step.from_buffer_copy(step)
    own.cos, own.sin = cos.data_ptr(), sin.data_ptr()
    own.cos_stride, own.pairs = cos.stride(0), cos.shape[1]
    return own


def _describe_needed(needed: NeededTokens, room: int) -> _Needed:
    tables, table_stride, query_lens, context_lens, count = needed.rows.arguments
    tokens = needed.tokens.ctypes.data
    return _Needed(tokens, tables, query_lens, context_lens, room, count, table_stride)


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
