"""The engine that computes with torch: pack, forward, sample."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from services.shard.batch import pack
from services.shard.domain import BlockId
from services.shard.engine import Computed, Draw
from services.shard.forward import ForwardPass
from services.shard.kv_pool import KvPool
from services.shard.sampler import sample
from services.shard.slots import ActiveRow


class TorchEngine:
    """Implements Engine over one model and its KV pool; lives in the worker thread."""

    def __init__(
        self, forward: ForwardPass, pool: KvPool, block_size: int, rope_switch_len: int = 0
    ) -> None:
        self._forward = forward
        self._pool = pool
        self._block_size = block_size
        # See Manifest.
        self.rope_switch_len = rope_switch_len

    def copy_blocks(self, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Copies K and V of whole blocks, in order."""
        with torch.inference_mode():
            self._pool.copy_blocks(pairs)

    def compute(self, rows: Sequence[ActiveRow], block_tables: npt.NDArray[np.int64]) -> Computed:
        """One forward pass over all rows, then one draw per row that samples."""
        batch = pack(rows, block_tables, self._block_size)
        draws = [Draw()] * len(rows)
        with torch.inference_mode():
            logits = self._forward.logits(batch)
            if not batch.sampled:
                return Computed(draws)
            start_s = time.perf_counter()
            sampled = [batch.order[i] for i in batch.sampled]
            for i, draw in zip(sampled, sample(logits, [rows[i] for i in sampled]), strict=True):
                draws[i] = draw
        return Computed(draws, time.perf_counter() - start_s)
