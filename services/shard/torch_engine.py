"""The engine that computes with torch: pack, forward, sample."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from infermesh.errors import NumericalError
from infermesh.telemetry import metrics
from services.shard.batch import pack
from services.shard.domain import BlockId
from services.shard.engine import Computed, Draw
from services.shard.forward import ForwardPass
from services.shard.kernels.library import Library
from services.shard.kernels.sampling import SamplingKernel
from services.shard.kv_pool import KvPool
from services.shard.sampler import sample
from services.shard.slots import ActiveRow

_sampled_rows = metrics.counter(
    "shard_sampled_rows_total", "Tokens drawn, by the C++ kernel or by torch.", ("by",)
)
_helped_parts = metrics.counter(
    "shard_kernel_helped_parts_total",
    "Parts of products and attention that a thread finished for one that was late.",
)


class TorchEngine:
    """Implements Engine over one model and its KV pool; lives in the worker thread."""

    def __init__(
        self,
        forward: ForwardPass,
        pool: KvPool,
        block_size: int,
        rope_switch_len: int = 0,
        kernels: Library | None = None,
    ) -> None:
        self._forward = forward
        self._kernel = None if kernels is None else SamplingKernel(kernels)
        self._library = kernels
        self._num_helped = 0 if kernels is None else kernels.num_helped()
        self._sampled_rows = _sampled_rows.labels("torch" if kernels is None else "kernel")
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
            broken = self._forward.broken_rows(batch)
            start_s = time.perf_counter()
            sampled = [batch.order[i] for i in batch.sampled]
            if sampled:
                drawn = sample(logits, [rows[i] for i in sampled], self._kernel)
                self._sampled_rows.inc(len(sampled))
                for i, draw in zip(sampled, drawn, strict=True):
                    draws[i] = draw
            sample_s = time.perf_counter() - start_s
        self._count_helped_parts()
        for i in broken:
            error = NumericalError("the model gave NaN or infinite states for this sequence")
            draws[batch.order[i]] = Draw(error=error)
        return Computed(draws, sample_s)

    def _count_helped_parts(self) -> None:
        if self._library is not None:
            before, self._num_helped = self._num_helped, self._library.num_helped()
            _helped_parts.inc(self._num_helped - before)
