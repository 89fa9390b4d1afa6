"""Block copies: in order, over all layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infermesh.errors import OutOfMemory
from services.shard.domain import BlockId
from services.shard.kv_pool import KvPool, KvShape

_SHAPE = KvShape(num_layers=2, num_kv_heads=1, head_dim=3, block_size=2, dtype=torch.bfloat16)
_pairs = st.lists(
    st.tuples(st.integers(0, 5).map(BlockId), st.integers(0, 5).map(BlockId)),
    min_size=1,
    max_size=10,
)


@given(_pairs)
def test_copy_blocks_equals_one_after_another_when_copies_depend_on_each_other(
    pairs: list[tuple[BlockId, BlockId]],
) -> None:
    pool = KvPool(_SHAPE, 6, torch.device("cpu"))
    for i, tensor in enumerate((*pool.keys, *pool.values)):
        tensor.copy_(torch.arange(6).view(6, 1, 1, 1) + 10 * i)
    blocks = list(range(6))
    for source, destination in pairs:
        blocks[destination] = blocks[source]
    pool.copy_blocks(pairs)
    for i, tensor in enumerate((*pool.keys, *pool.values)):
        assert (tensor - 10 * i).flatten(1).unique(dim=1)[:, 0].tolist() == blocks


def test_pool_is_out_of_memory_when_it_can_not_be_allocated() -> None:
    with pytest.raises(OutOfMemory, match="KV blocks"):
        KvPool(_SHAPE, 1 << 50, torch.device("cpu"))


def test_states_are_rounded_when_they_are_wider_than_the_pool() -> None:
    pool = KvPool(_SHAPE, 3, torch.device("cpu"))
    key, value = torch.randn(2, 4, 1, 3)
    slots = torch.tensor([5, 0, 3, 2])
    pool.write(1, slots, key, value)
    assert torch.equal(pool.keys[1].flatten(0, 1)[slots], key.bfloat16())
    assert torch.equal(pool.values[1].flatten(0, 1)[slots], value.bfloat16())
