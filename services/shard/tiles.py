"""Products whose rows do not depend on each other: every linear layer runs in tiles of fixed shape.

A BLAS picks kernel and order of summation by the shape of a product, so that a row of a large batch
differs in its last bits from the same row alone. In tiles of one shape it can't. That a row's place
within its tile does not matter either is tried on this machine when a model is loaded, and a
machine on which it does is refused. The caller keeps everything else to one thread and whole
vectors: see `ForwardPass`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from infermesh.errors import UnsupportedModel

# Whole vectors of every instruction set, two at a time, as soon as a row has four values.
TILE = 16
# Larger ones pack the weights less often; used where they give the same bits as the small one.
_LARGE_TILES = (256, 64)
# Places of a row within the tile that are compared.
_SHIFTS = (1, 2, 3, 5, 8, 13)

Product = Callable[[torch.Tensor], Any]


class RowTiles(nn.Module):
    """Stands in for a module that works row by row, [n, width] in, one or more [n, …] out.

    Args:
        sizes: rows of the tiles, largest first; the last is TILE.
        num_threads: of the products; what surrounds them has one.
    """

    def __init__(self, inner: nn.Module, sizes: tuple[int, ...], num_threads: int) -> None:
        super().__init__()
        self.inner = inner
        self._sizes = sizes
        self._num_threads = num_threads

    @property
    def weight(self) -> Any:
        """What model code may ask a linear layer for."""
        return self.inner.weight

    def forward(self, x: torch.Tensor) -> Any:
        """The module's own result; x is [..., width] with a multiple of TILE rows."""
        rows = x.reshape(-1, x.shape[-1])
        with _threads(self._num_threads):
            made = in_tiles(self.inner, rows, self._sizes)
        return made.view(*x.shape[:-1], made.shape[-1]) if isinstance(made, torch.Tensor) else made


class TiledExperts(nn.Module):
    """Stands in for the experts of Mixtral and Qwen 3 MoE, which take as many rows as were routed
    to them; here they are filled up to whole tiles."""

    def __init__(self, inner: nn.Module, num_threads: int) -> None:
        super().__init__()
        self.inner = inner
        self._num_threads = num_threads

    def forward(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[n, width] as transformers' own, experts in ascending order."""
        inner: Any = self.inner
        out = torch.zeros_like(hidden)
        for expert in sorted(set(top_k_index.view(-1).tolist())):
            tokens, places = torch.where(top_k_index == expert)
            num_rows = len(tokens)
            filled = nn.functional.pad(tokens, (0, -num_rows % TILE))
            both = self._linear(hidden[filled], inner.gate_up_proj[expert])
            gate, up = both.chunk(2, dim=-1)
            mixed = self._linear(inner.act_fn(gate) * up, inner.down_proj[expert])[:num_rows]
            mixed = mixed * top_k_weights[tokens, places, None]
            out.index_add_(0, tokens, mixed.to(out.dtype))
        return out

    def _linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with _threads(self._num_threads):
            made: torch.Tensor = in_tiles(
                lambda tile: nn.functional.linear(tile, weight), x, (TILE,)
            )
        return made


def install(model: nn.Module, num_threads: int) -> None:
    """Puts every product of a model on a CPU into tiles, and leaves torch with one thread.

    Raises:
        UnsupportedModel: rows depend on their place in a tile on this machine, or the model has a
            product that is not known here.
    """
    torch.set_num_threads(1)
    tried: dict[object, tuple[int, ...]] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kind = type(child).__name__
            if kind.endswith("Experts"):
                experts: Any = child
                for matrix in (experts.gate_up_proj[0], experts.down_proj[0]):
                    _try_linear(matrix, num_threads)
                setattr(parent, name, TiledExperts(child, num_threads))
            elif isinstance(child, nn.Linear) or kind == "Conv1D" or kind.endswith("TopKRouter"):
                weight: torch.Tensor = child.weight  # type: ignore[assignment]
                key = (kind, weight.shape, getattr(child, "bias", None) is None)
                if key not in tried:
                    width = weight.shape[0 if kind == "Conv1D" else 1]
                    tried[key] = usable_tiles(child, width, weight.dtype, num_threads)
                setattr(parent, name, RowTiles(child, tried[key], num_threads))


def in_tiles(product: Product, rows: torch.Tensor, sizes: tuple[int, ...]) -> Any:
    """The product of all rows, a tile at a time."""
    if len(rows) <= TILE:
        return product(rows)
    made = [product(rows[start:end]) for start, end in cuts(len(rows), sizes)]
    if isinstance(made[0], torch.Tensor):
        return torch.cat(made)
    return tuple(torch.cat(parts) for parts in zip(*made, strict=True))


def cuts(num_rows: int, sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, end) of each tile, as large as possible; `num_rows` is a multiple of the last."""
    start = 0
    for size in sizes:
        while num_rows - start >= size:
            yield start, start + size
            start += size


def usable_tiles(
    product: Product, width: int, dtype: torch.dtype, num_threads: int
) -> tuple[int, ...]:
    """Sizes that give the same bits on random rows, the largest first.

    Raises:
        UnsupportedModel: not even the smallest gives a row the same bits at every place.
    """
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(_LARGE_TILES[0], width, generator=draw).to(dtype)
    with torch.inference_mode(), _threads(num_threads):
        wanted = _first(in_tiles(product, rows, (TILE,)))
        for shift in _SHIFTS:
            moved = _first(in_tiles(product, rows.roll(shift, 0), (TILE,)))
            if not torch.equal(moved.roll(-shift, 0), wanted):
                raise UnsupportedModel(
                    "deterministic mode can't be kept on this machine: a row of a product depends "
                    f"on its place among {TILE} rows (width {width}, {num_threads} threads)"
                )
        large = [
            size
            for size in _LARGE_TILES
            if torch.equal(_first(in_tiles(product, rows, (size,))), wanted)
        ]
    return (*large, TILE)


def _try_linear(weight: torch.Tensor, num_threads: int) -> None:
    usable_tiles(
        lambda tile: nn.functional.linear(tile, weight), weight.shape[1], weight.dtype, num_threads
    )


def _first(made: Any) -> torch.Tensor:
    found: torch.Tensor = made if isinstance(made, torch.Tensor) else made[0]
    return found


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch's threads in this thread; one again afterwards."""
    if count == 1:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)
