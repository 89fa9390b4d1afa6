"""Modules that do in a few kernel calls what transformers' own do in many operations of torch.

None of them knows an architecture: `fusing` puts them where they were seen to compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from services.shard.attention import ScoreRules
from services.shard.footprint import WithoutParameters
from services.shard.kernels.elementwise import Elementwise
from services.shard.kernels.layers import LayerParts, LayersKernel, Room
from services.shard.kernels.library import Library
from services.shard.kernels.products import PackedMatrix


class FusedNorm(nn.Module):
    """RMSNorm over the last dimension; `offset` is 1 where weights are kept less 1."""

    def __init__(
        self, kernels: Elementwise, weight: nn.Parameter, eps: float, offset: float
    ) -> None:
        super().__init__()
        self.weight = weight
        self._kernels = kernels
        self.eps, self.offset = eps, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] → the same."""
        return self._kernels.rms_norm(x, self.weight, self.eps, offset=self.offset)


# cos and sin, as the model gives them to its layers: [1, tokens, head_dim] each.
Tables = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Gated:
    """The two halves of a gated MLP: in which order they come, and what the gate goes through."""

    activation: str
    gate_first: bool


class FusedMlp(WithoutParameters):
    """down(activation(gate(x)) * up(x)).

    Args:
        both: gate and up in one matrix, of two parts or of one whose halves they are.
    """

    def __init__(
        self, kernels: Elementwise, both: PackedMatrix, down: PackedMatrix, gated: Gated
    ) -> None:
        super().__init__()
        self._kernels = kernels
        self.both, self.down, self.gated = both, down, gated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] → the same."""
        return self.down.multiply(self.hidden(x)).view(x.shape)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] → [rows, columns of down]."""
        rows = x.reshape(-1, x.shape[-1])
        halves = self.both.multiply(rows).chunk(2, dim=-1)
        gate, up = halves if self.gated.gate_first else halves[::-1]
        return self._kernels.gate(self.gated.activation, gate, up)


@dataclass(frozen=True, slots=True)
class HeadRules:
    """How an attention module treats its heads.

    Attributes:
        order: of q, k and v among the parts of the matrix.
        neighbours: see Elementwise.rotate.
        norms: of q and k; None where there are none.
        norm_whole: they run over all heads together, not over each.
        score_rules, window: what the module asks of the paged attention.
    """

    head_dim: int
    order: tuple[int, int, int]
    neighbours: bool
    norms: tuple[FusedNorm, FusedNorm] | None
    norm_whole: bool
    score_rules: ScoreRules
    window: int | None


class FusedAttention(WithoutParameters):
    """Products, norms, rotations and the paged attention of one layer.

    Args:
        qkv: one matrix of three parts.
    """

    def __init__(
        self,
        kernels: Elementwise,
        layer: int,
        qkv: PackedMatrix,
        out: PackedMatrix,
        rules: HeadRules,
    ) -> None:
        super().__init__()
        self._kernels = kernels
        self.layer = layer
        self.qkv, self.out, self.rules = qkv, out, rules
        if rules.norms is not None:
            self.q_norm, self.k_norm = rules.norms

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Tables,
        *_: Any,
        paged: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, None]:
        """[1, tokens, width] → the same, and no weights; see paged_attention_forward."""
        rules = self.rules
        parts = self.qkv.split(hidden_states[0])
        q, k, v = (
            self._heads(parts[i], norm) for i, norm in zip(rules.order, self._norms(), strict=True)
        )
        cos, sin = (_one_per_pair(table[0], rules.neighbours) for table in position_embeddings)
        for states in (q, k):
            self._kernels.rotate(states, cos, sin, neighbours=rules.neighbours)
        paged.store(self.layer, k, v)
        pools = (paged.pool.keys[self.layer], paged.pool.values[self.layer])
        mixed = paged.attend(q, *pools, rules.score_rules, rules.window)
        return self.out.multiply(mixed.reshape(len(mixed), -1))[None], None

    def _norms(self) -> tuple[FusedNorm | None, FusedNorm | None, None]:
        return (*(self.rules.norms or (None, None)), None)

    def _heads(self, rows: torch.Tensor, norm: FusedNorm | None) -> torch.Tensor:
        """[tokens, heads, head_dim]."""
        heads = rows.view(len(rows), -1, self.rules.head_dim)
        if norm is None:
            return heads
        normed: torch.Tensor = norm(rows if self.rules.norm_whole else heads)
        return normed.view(heads.shape)


def _one_per_pair(table: torch.Tensor, neighbours: bool) -> torch.Tensor:
    """[tokens, pairs] of a table that has each value twice."""
    return table[:, ::2] if neighbours else table[:, : table.shape[1] // 2]


class FusedLayer(WithoutParameters):
    """A whole decoder layer.

    Args:
        layer: its number.

    Attributes:
        stack: the layers that it runs with.
    """

    def __init__(self, library: Library, room: Room, layer: int, parts: LayerParts) -> None:
        super().__init__()
        self.layer, self.parts = layer, parts
        self.stack = Stack(library, room, [self])

    def forward(
        self,
        hidden_states: torch.Tensor,
        *_: Any,
        position_embeddings: Tables,
        paged: Any,
        **__: Any,
    ) -> torch.Tensor:
        """[1, tokens, width] → the same; see Stack."""
        return self.stack.called(self, hidden_states, position_embeddings, paged)


class Stack:
    """Layers that follow one another with nothing between them: each but the last gives back what
    it was given, the last computes them all in one call.

    Attributes:
        tables: of the layers that were called in the last pass.
    """

    def __init__(self, library: Library, room: Room, layers: Sequence[FusedLayer]) -> None:
        self._numbers = [layer.layer for layer in layers]
        self._kernel = LayersKernel(library, {one.layer: one.parts for one in layers}, room)
        self._neighbours = layers[0].parts.neighbours
        self.tables: list[Tables] = []

    def called(
        self, layer: FusedLayer, states: torch.Tensor, tables: Tables, paged: Any
    ) -> torch.Tensor:
        """The model calls a layer."""
        if layer.layer == self._numbers[0]:  # a pass before this may have broken off
            self.tables = []
        self.tables.append(tables)
        if layer.layer != self._numbers[-1]:
            return states
        # most models have one pair of tables for all layers
        tables_by_id = {id(each): each for each in self.tables}
        pairs = {number: self._one_per_pair(each) for number, each in tables_by_id.items()}
        return self._run(states, [pairs[id(each)] for each in self.tables], paged)

    def run(self, states: torch.Tensor, tables: Tables, paged: Any) -> torch.Tensor:
        """All layers with the same tables: [1, tokens, width] → the same."""
        return self._run(states, [self._one_per_pair(tables)] * len(self._numbers), paged)

    def _run(self, states: torch.Tensor, tables: Sequence[Tables], paged: Any) -> torch.Tensor:
        step = (paged.pool, paged.rows, paged.token_slots, paged.needed)
        return self._kernel.run(states[0], tables, *step)[None]

    def _one_per_pair(self, tables: Tables) -> Tables:
        cos, sin = (_one_per_pair(table[0], self._neighbours).contiguous() for table in tables)
        return cos, sin
