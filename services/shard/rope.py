"""Rotary tables that depend on a sequence's length (LongRoPE, arXiv:2402.13753), in a packed batch.

transformers picks the table from the longest position of a batch: right for one sequence, wrong for
its neighbours. Here the model's own module is asked twice, for the short and for the long ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from infermesh.errors import ProtocolViolation, UnsupportedModel
from services.shard.batch import Batch


class PerSequenceRope(nn.Module):
    """Stands in for a model's rotary module; `choose` precedes each forward pass.

    Args:
        rotary: transformers' module, which takes its long table where a position reaches
            `switch_len`.
    """

    def __init__(self, rotary: nn.Module, switch_len: int) -> None:
        super().__init__()
        self._rotary = rotary
        self.switch_len = switch_len
        # [num_tokens], true for tokens of long sequences; None where there are none.
        self._long: torch.Tensor | None = None
        self._all_long = False

    def choose(self, batch: Batch, device: torch.device) -> None:
        """Which tokens of the next forward pass belong to long sequences.

        Raises:
            ProtocolViolation: a sequence outgrew the short table in its place; it would be wrong
                from here on.
        """
        long = batch.long_rope
        reached = batch.positions >= self.switch_len
        if (reached if long is None else reached & ~long).any():
            raise ProtocolViolation(
                f"a sequence grew past {self.switch_len} tokens without being placed anew"
            )
        self._long = None if long is None else torch.from_numpy(long).to(device)
        self._all_long = long is not None and bool(long.all())

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [1, num_tokens, rotary_dim] each."""
        if self._long is None:
            short: tuple[torch.Tensor, torch.Tensor] = self._rotary(x, position_ids)
            return short
        # One position more, dropped again: a chunk of a long sequence may end before the switch.
        reaching = nn.functional.pad(position_ids, (0, 1), value=self.switch_len)
        long = [table[:, :-1] for table in self._rotary(x, reaching)]
        if self._all_long:
            return long[0], long[1]
        tables = self._rotary(x, position_ids.masked_fill(self._long, 0))
        choose = self._long[:, None]
        return torch.where(choose, long[0], tables[0]), torch.where(choose, long[1], tables[1])


def install(model: Any) -> PerSequenceRope | None:
    """Puts a PerSequenceRope into a model that needs one.

    Raises:
        UnsupportedModel: it has such tables for some of its layers only.
    """
    parameters = getattr(model.config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    if any(group.get("rope_type") == "longrope" for group in nested):
        raise UnsupportedModel("longrope in some layers only is not supported")
    if parameters.get("rope_type") != "longrope":
        return None
    base = getattr(model, model.base_model_prefix)
    rope = PerSequenceRope(base.rotary_emb, int(parameters["original_max_position_embeddings"]))
    base.rotary_emb = rope
    return rope
