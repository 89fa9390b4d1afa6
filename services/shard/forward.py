"""The model's forward pass over a packed batch, with attention over the paged pool.

transformers owns the model code; ours is the attention, registered under the name
`infermesh_paged`. No mask function has that name, so the model builds no mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from services.shard.attention import ScoreRules, attend
from services.shard.attention_plan import AttentionLayout
from services.shard.batch import Batch
from services.shard.kv_pool import KvPool
from services.shard.rope import PerSequenceRope
from services.shard.scratch import Scratch

ATTENTION_NAME = "infermesh_paged"


@dataclass(frozen=True, slots=True)
class PagedContext:
    """What every layer's attention needs in one step; travels through the model's kwargs."""

    pool: KvPool
    layout: AttentionLayout
    token_slots: torch.Tensor
    scratch: Scratch


def paged_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: PagedContext,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: tensors [1, heads, tokens, head_dim] in, [1, tokens,
    heads, head_dim] out. Stores the tokens' K and V before anything is read."""
    if attention_mask is not None:
        raise AssertionError("a mask was built for packed sequences")
    layer: int = module.layer_idx
    pool = paged.pool
    pool.write(layer, paged.token_slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(
        query[0].transpose(0, 1),
        pool.keys[layer],
        pool.values[layer],
        paged.layout,
        ScoreRules(scale, softcap, s_aux),
        sliding_window,
        paged.scratch,
    )
    return out.unsqueeze(0), None


def register() -> None:
    """Makes the attention known to transformers; harmless when repeated."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)


class ForwardPass:
    """One loaded model and its KV pool."""

    def __init__(
        self,
        model: Any,
        pool: KvPool,
        num_heads: int,
        device: torch.device,
        rope: PerSequenceRope | None = None,
    ) -> None:
        self._model = model
        self._rope = rope
        self._pool = pool
        self._num_heads = num_heads
        self._device = device
        self._scratch = Scratch(device)

    def logits(self, batch: Batch) -> torch.Tensor:
        """[sampled rows, vocab_size], in the order of `batch.sampled`, in the model's type."""
        keys = self._pool.keys[0]
        layout = AttentionLayout(
            batch.block_tables,
            batch.query_lens,
            batch.context_lens,
            keys.shape[1],
            self._num_heads,
            keys.shape[2],
            keys.shape[3],
            self._device,
        )
        # One transfer for everything that is one integer per token.
        packed = torch.from_numpy(
            np.stack((batch.token_ids, batch.positions, batch.token_slots))
        ).to(self._device)
        paged = PagedContext(self._pool, layout, packed[2], self._scratch)
        if self._rope is not None:
            self._rope.choose(batch, self._device)
        output = self._model(
            input_ids=packed[0:1],
            position_ids=packed[1:2],
            use_cache=False,
            logits_to_keep=torch.from_numpy(batch.logit_indices).to(self._device),
            paged=paged,
        )
        logits: torch.Tensor = output.logits[0]
        return logits
