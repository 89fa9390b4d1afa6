"""The paged KV memory: per layer one K and one V tensor of blocks, written by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from infermesh.errors import OutOfMemory
from services.shard.domain import BlockId


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one token's K and V look like, in every layer."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, K and V."""
        values = 2 * self.num_layers * self.block_size * self.num_kv_heads * self.head_dim
        return values * self.dtype.itemsize


class KvPool:
    """K and V of all layers, each [num_blocks, block_size, num_kv_heads, head_dim].

    Memory is not initialised: nothing reads a position that was not written before.
    """

    def __init__(self, shape: KvShape, num_blocks: int, device: torch.device) -> None:
        """Raises OutOfMemory where the device can't hold it."""
        count = shape.num_layers
        size = (2 * count, num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
        try:
            # In one piece: a copy of blocks is one read and one write for all layers.
            self._memory = torch.empty(size, dtype=shape.dtype, device=device)
        except RuntimeError as exc:  # torch.OutOfMemoryError on CUDA, RuntimeError on CPU
            raise OutOfMemory(
                f"no memory on {device} for {num_blocks} KV blocks "
                f"({num_blocks * shape.block_bytes >> 20} MiB)"
            ) from exc
        layers = list(self._memory)
        self.keys, self.values = layers[:count], layers[count:]

    def write(
        self, layer: int, token_slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Stores K and V [num_tokens, num_kv_heads, head_dim] at block * block_size + offset,
        rounded to the pool's type."""
        for pool, states in ((self.keys[layer], key), (self.values[layer], value)):
            pool.flatten(0, 1).index_copy_(0, token_slots, states.to(pool.dtype))

    def copy_blocks(self, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Copies whole blocks in all layers, in order: a destination may be a later source."""
        for batch in independent_batches(pairs):
            source, destination = torch.tensor(batch, device=self.keys[0].device).T
            self._memory.index_copy_(1, destination, self._memory.index_select(1, source))


def independent_batches(
    pairs: Sequence[tuple[BlockId, BlockId]],
) -> list[list[tuple[BlockId, BlockId]]]:
    """Splits copies into runs that may be done at once: no block written twice, nor read after
    it was written in the same run."""
    batches: list[list[tuple[BlockId, BlockId]]] = []
    written: set[BlockId] = set()
    for source, destination in pairs:
        if not batches or source in written or destination in written:
            batches.append([])
            written = set()
        batches[-1].append((source, destination))
        written.add(destination)
    return batches
