"""How a module is tried beside another: a few tokens of one sequence, and room for what they leave.

Decides nothing but whether two results agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from services.shard.forward import PagedContext
from services.shard.kernels.library import Library
from services.shard.kernels.paged import PagedAttention, PagedRows
from services.shard.kernels.products import PackedMatrix
from services.shard.kv_pool import KvPool, KvShape
from services.shard.surgery.fused import FusedLayer
from services.shard.surgery.packed import PackedLinear

NUM_TOKENS = 3
# Of the largest value: float32 through a product or two.
_TOLERANCE = 1e-4


def one_page(library: Library, num_layers: int, num_kv_heads: int, head_dim: int) -> PagedContext:
    """Room for NUM_TOKENS of one sequence in a pool of one block."""
    shape = KvShape(num_layers, num_kv_heads, head_dim, NUM_TOKENS, torch.float32)
    pool = KvPool(shape, 1, torch.device("cpu"))
    rows = PagedRows.of(*(np.array(value) for value in ([[0]], [NUM_TOKENS], [NUM_TOKENS])))
    kernels = PagedAttention(library, torch.float32)

    def attend(q: torch.Tensor, *asked: Any) -> torch.Tensor:
        keys, values, rules, window = asked
        return kernels.attend(q, keys, values, rows, rules, window)

    return PagedContext(pool, attend, torch.arange(NUM_TOKENS), kernels, rows)


def page_of(library: Library, model: nn.Module) -> PagedContext:
    """One that all layers of a model may use, of which some are fused."""
    numbers = (getattr(one, "layer", getattr(one, "layer_idx", 0)) for one in model.modules())
    num_layers = 1 + max(number for number in numbers if isinstance(number, int))
    parts = next(one.parts for one in model.modules() if isinstance(one, FusedLayer))
    num_kv_heads = parts.qkv.sizes[parts.order[1]] // parts.head_dim
    return one_page(library, num_layers, num_kv_heads, parts.head_dim)


def given(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What it gives; None where it can't be called like that."""
    try:
        return compute(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
        return None


@contextmanager
def given_to(matrix: PackedMatrix, linears: Iterable[PackedLinear]) -> Iterator[list[torch.Tensor]]:
    """What those of some linears that multiply by a matrix are given meanwhile, [rows, columns].

    A product may round what it is given, and two tensors that are the same but for rounding give
    results that are not: so what goes into it is compared, and what comes out of the same.
    """
    seen: list[torch.Tensor] = []

    def note(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].reshape(-1, matrix.num_columns))

    hooks = [
        linear.register_forward_pre_hook(note)
        for linear in linears
        if linear.shared.matrix is matrix
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def agree(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """They are the same but for rounding."""
    if got.shape != wanted.shape or not bool(torch.isfinite(wanted).all()):
        return False
    return bool((got - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())
