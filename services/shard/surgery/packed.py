"""Modules whose matrices are packed for the C++ kernels.

They compute in float32 whatever the matrices are stored in: while a processor waits for memory, it
widens a weight in a register for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from services.shard.footprint import WithoutParameters
from services.shard.kernels.products import PackedMatrix


class Shared:
    """One matrix of several products that are given the same tensor: computed once for all.

    The first that is asked computes for all; the others find the result by the tensor's identity.
    A product that is asked with another tensor computes anew, so that nothing depends on the model
    behaving as it did when it was watched.
    """

    def __init__(self, matrix: PackedMatrix) -> None:
        self.matrix = matrix
        self._x: torch.Tensor | None = None
        self._parts: list[torch.Tensor | None] = []

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """[..., columns] → [..., rows of the part]."""
        if self._x is not x or self._parts[index] is None:
            self._parts = list(self.matrix.split(x.reshape(-1, x.shape[-1])))
            self._x = x
        found, self._parts[index] = self._parts[index], None
        assert found is not None
        if all(part is None for part in self._parts):
            self._x = None
        return found.view(*x.shape[:-1], found.shape[-1])


class PackedLinear(WithoutParameters):
    """In place of nn.Linear and Conv1D.

    Args:
        index: of its part in the shared matrix.
    """

    def __init__(self, shared: Shared, index: int, num_weights: int, weight_bytes: int) -> None:
        super().__init__(num_weights, weight_bytes)
        self.shared = shared
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out], in x's type."""
        return self.shared.part(self.index, x)


class PackedEmbedding(WithoutParameters):
    """In place of an embedding whose table is the output head's matrix."""

    def __init__(self, original: Any, table: PackedMatrix) -> None:
        super().__init__()
        self.table = table
        self.embed_scale: torch.Tensor | None = getattr(original, "embed_scale", None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] → float32 [..., width]."""
        rows = self.table.rows(ids.view(-1)).float().view(*ids.shape, -1)
        return rows if self.embed_scale is None else rows * self.embed_scale


class WideEmbedding(WithoutParameters):
    """In place of an embedding in bfloat16, which stays as it is: what is looked up is widened."""

    def __init__(self, original: Any, table: torch.Tensor) -> None:
        super().__init__(table.numel(), table.nbytes)
        self.table = table
        self.embed_scale: torch.Tensor | None = getattr(original, "embed_scale", None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] → float32 [..., width]."""
        rows: torch.Tensor = self.table[ids].float()
        return rows if self.embed_scale is None else rows * self.embed_scale


class PackedExperts(WithoutParameters):
    """In place of transformers' experts of Mixtral and Qwen 3 MoE."""

    def __init__(
        self,
        act_fn: Callable[[torch.Tensor], torch.Tensor],
        gate_up: list[PackedMatrix],
        down: list[PackedMatrix],
    ) -> None:
        matrices = gate_up + down
        super().__init__(
            sum(matrix.num_rows * matrix.num_columns for matrix in matrices),
            sum(matrix.num_bytes for matrix in matrices),
        )
        self.act_fn = act_fn
        self.gate_up, self.down = gate_up, down

    def forward(
        self, x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, width], and of each token its experts and their weights [tokens, k]."""
        out = torch.zeros_like(x)
        for expert in sorted(set(expert_ids.flatten().tolist())):
            tokens, places = torch.where(expert_ids == expert)
            gate, up = self.gate_up[expert].multiply(x[tokens]).chunk(2, dim=-1)
            down = self.down[expert].multiply(self.act_fn(gate) * up)
            out.index_add_(0, tokens, down * expert_weights[tokens, places, None])
        return out
