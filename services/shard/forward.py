"""The model's forward pass over a packed batch, with attention over the paged pool.

transformers owns the model code; ours is the attention, registered under the name
`infermesh_paged`. No mask function has that name, so the model builds no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AttentionInterface

from infermesh.telemetry import metrics
from services.shard.attention import ScoreRules, attend
from services.shard.attention_plan import AttentionLayout
from services.shard.batch import Batch, padded
from services.shard.kernels.library import Library
from services.shard.kernels.paged import DTYPES, NeededTokens, PagedAttention, PagedRows
from services.shard.kv_pool import KvPool
from services.shard.rope import PerSequenceRope
from services.shard.scratch import Scratch
from services.shard.tiled_attention import TiledLayout, attend_tiled
from services.shard.tiles import TILE

if TYPE_CHECKING:  # it is found by passes with what is here
    from services.shard.surgery.shortcut import Shortcut

ATTENTION_NAME = "infermesh_paged"
_unneeded_tokens = metrics.counter(
    "shard_unneeded_states_total",
    "Tokens of prompts of which the last layer computed K and V alone.",
)

# (q, k_pool, v_pool, rules, sliding window) → mixed values; see attention.attend
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, ScoreRules, int | None], torch.Tensor]


@dataclass(frozen=True, slots=True)
class PagedContext:
    """What every layer's attention needs in one step; travels through the model's kwargs."""

    pool: KvPool
    attend: Attend
    token_slots: torch.Tensor
    kernels: PagedAttention | None = None
    # Where there are kernels: the step's rows as they read them.
    rows: PagedRows | None = None
    # Where the last layer is not computed for all tokens; only a shortcut may leave that out.
    needed: NeededTokens | None = None

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """K and V [num_tokens, num_kv_heads, head_dim] of the step's tokens go into the pool."""
        if self.kernels is None:
            self.pool.write(layer, self.token_slots, keys, values)
        else:
            pools = (self.pool.keys[layer], self.pool.values[layer])
            self.kernels.write(*pools, self.token_slots, keys, values)


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
    num_stored = len(paged.token_slots)
    keys, values = (state[0].transpose(0, 1)[:num_stored] for state in (key, value))
    paged.store(layer, keys, values)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rules = ScoreRules(scale, softcap, s_aux)
    pools = (pool.keys[layer], pool.values[layer])
    out = paged.attend(query[0].transpose(0, 1), *pools, rules, sliding_window)
    return out.unsqueeze(0), None


def register() -> None:
    """Makes the attention known to transformers; harmless when repeated."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)


class ForwardPass:
    """One loaded model and its KV pool.

    Args:
        tiled: the model's products are in tiles (see `tiles`); so are its tokens, its logits and
            its attention then, and a row's logits depend on that row alone, bit for bit.
        kernels: compiled ones, used where they take the pool's type and device.
        shortcut: the way through the model that is taken, where there is one and kernels are used.
    """

    def __init__(
        self,
        model: Any,
        pool: KvPool,
        num_heads: int,
        device: torch.device,
        rope: PerSequenceRope | None = None,
        tiled: bool = False,
        kernels: Library | None = None,
        shortcut: Shortcut | None = None,
    ) -> None:
        self._model = model
        self._rope = rope
        self._pool = pool
        self._num_heads = num_heads
        self._device = device
        self._scratch = Scratch(device)
        self._tiled = tiled
        dtype = pool.keys[0].dtype
        usable = device.type == "cpu" and not tiled and dtype in DTYPES
        self._kernels = PagedAttention(kernels, dtype) if kernels and usable else None
        self._shortcut = None if self._kernels is None else shortcut
        # Of the last pass: [1, tokens and padding, hidden_size].
        self._states: torch.Tensor | None = None
        # The model without its head.
        self._decoder = getattr(model, model.base_model_prefix)
        self._decoder.register_forward_hook(self._keep_states)

    def logits(self, batch: Batch) -> torch.Tensor:
        """[sampled rows, vocab_size], in the order of `batch.sampled`, in the model's type; [0, 0]
        where no row samples, and the head is not computed at all."""
        if self._tiled:
            batch = padded(batch, TILE)
        # One transfer for everything that is one integer per token.
        packed = torch.from_numpy(np.stack((batch.token_ids, batch.positions))).to(self._device)
        token_slots = torch.from_numpy(batch.token_slots).to(self._device)
        if self._rope is not None:
            self._rope.choose(batch, self._device)
        rows = None
        if self._kernels is not None:
            rows = PagedRows.of(batch.block_tables, batch.query_lens, batch.context_lens)
        attend = self._attend(batch, rows)
        needed = None if self._shortcut is None else _needed(batch)
        if needed is not None:
            _unneeded_tokens.inc(len(batch.token_ids) - len(needed.tokens))
        paged = PagedContext(self._pool, attend, token_slots, self._kernels, rows, needed)
        ids, positions = packed[0:1], packed[1:2]
        if self._shortcut is not None:
            self._states = states = self._shortcut.states(ids, positions, paged)
            if not batch.sampled:
                return torch.empty(0, 0)
            return self._shortcut.logits(states, torch.from_numpy(batch.logit_indices))[0]
        inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False, "paged": paged}
        if not batch.sampled:  # chunks of prompts: only what they leave in the pool counts
            self._decoder(**inputs)
            return torch.empty(0, 0, device=self._device)
        kept = torch.from_numpy(batch.logit_indices).to(self._device)
        output = self._model(**inputs, logits_to_keep=kept)
        logits: torch.Tensor = output.logits[0, : len(batch.sampled)]
        return logits

    def broken_rows(self, batch: Batch) -> list[int]:
        """Packed rows of the last pass in which any token's state is no finite number.

        A row's logits tell of its last token alone, and a NaN reaches tokens before it: masked, it
        has weight 0, and 0 times NaN is NaN. Blocks before the one that caused it hold NaN then.
        Rows of one sampled token are left out: their logits say it.
        """
        states, self._states = self._states, None
        assert states is not None
        if len(batch.sampled) == len(batch.token_ids):
            return []
        asked = np.ones(len(batch.query_lens), dtype=bool)
        asked[batch.sampled] = batch.query_lens[batch.sampled] > 1
        if not asked.any():
            return []
        ends = np.cumsum(batch.query_lens)
        # A sum is finite where all terms are.
        sums = states[0, : int(ends[-1])].sum(dim=-1, dtype=torch.float32)
        finite = torch.isfinite(sums).cpu().numpy()
        whole = np.logical_and.reduceat(finite, ends - batch.query_lens)
        found: list[int] = np.flatnonzero(asked & ~whole).tolist()
        return found

    def _keep_states(self, module: Any, args: Any, output: Any) -> None:
        self._states = output.last_hidden_state

    def _attend(self, batch: Batch, compiled_rows: PagedRows | None) -> Attend:
        """Attention of this step's rows."""
        _, block_size, num_kv_heads, head_dim = self._pool.keys[0].shape
        if self._kernels is not None and compiled_rows is not None:
            compiled = self._kernels.attend
            return lambda q, keys, values, rules, window: compiled(
                q, keys, values, compiled_rows, rules, window
            )
        rows = (batch.block_tables, batch.query_lens, batch.context_lens, block_size)
        scratch = self._scratch
        if self._tiled:
            tiles = TiledLayout(*rows, num_kv_heads, head_dim)
            return lambda q, keys, values, rules, window: attend_tiled(
                q, keys, values, tiles, rules, window, scratch
            )
        layout = AttentionLayout(*rows, self._num_heads, num_kv_heads, head_dim, self._device)
        return lambda q, keys, values, rules, window: attend(
            q, keys, values, layout, rules, window, scratch
        )


def _needed(batch: Batch) -> NeededTokens | None:
    """Those that are sampled behind."""
    if len(batch.logit_indices) == len(batch.token_ids):
        return None
    sampled = list(batch.sampled)
    tables, contexts = batch.block_tables[sampled], batch.context_lens[sampled]
    rows = PagedRows.of(tables, np.ones(len(sampled), dtype=np.int64), contexts)
    return NeededTokens(batch.logit_indices, rows)
