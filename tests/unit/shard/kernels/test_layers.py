"""Whole layers over pools of either type: what they write, and what they read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from services.shard.kernels.layers import LayerParts, LayersKernel, Room
from services.shard.kernels.library import Library
from services.shard.kernels.paged import NeededTokens, PagedRows
from services.shard.kernels.products import Packer
from services.shard.kv_pool import KvPool, KvShape
from tests.random_layers import LayerSize, random_layer

WIDTH, HEADS, KV_HEADS, DIM, HIDDEN = 24, 6, 2, 20, 40
NUM_TOKENS, BLOCK = 5, 4
SIZE = LayerSize(WIDTH, HEADS, KV_HEADS, DIM, HIDDEN)


@pytest.fixture
def layer(kernels: Library) -> LayersKernel:
    parts = random_layer(Packer(kernels), SIZE, torch.Generator().manual_seed(1))
    return LayersKernel(kernels, {0: parts}, Room())


def filled(dtype: torch.dtype, k: torch.Tensor | float, v: torch.Tensor | float) -> KvPool:
    """K and V of six blocks."""
    pool = KvPool(KvShape(1, KV_HEADS, DIM, BLOCK, dtype), 6, torch.device("cpu"))
    pool.keys[0][:], pool.values[0][:] = k, v
    return pool


def run(layer: LayersKernel, x: torch.Tensor, pool: KvPool, slots: torch.Tensor) -> torch.Tensor:
    """The last tokens of one sequence in blocks 2, 0, 3."""
    angles = torch.arange(float(NUM_TOKENS))[:, None] * 10.0 ** -torch.arange(DIM / 2)
    rows = PagedRows.of(np.array([[2, 0, 3]]), np.array([NUM_TOKENS]), np.array([11]))
    return layer.run(x, [(angles.cos(), angles.sin())], pool, rows, slots)


def test_a_layer_writes_what_it_would_write_in_float32_rounded_once(layer: LayersKernel) -> None:
    x = torch.randn(NUM_TOKENS, WIDTH)
    slots = torch.tensor([1, 2, 3, 12, 13])
    wide, narrow = filled(torch.float32, 1, 1), filled(torch.bfloat16, 1, 1)
    for pool in (wide, narrow, wide):  # back again, too
        run(layer, x, pool, slots)
    for one, other in ((wide.keys[0], narrow.keys[0]), (wide.values[0], narrow.values[0])):
        assert bool((one.flatten(0, 1)[slots] != 1).any(-1).all())
        assert torch.equal(one.bfloat16(), other)


def test_a_layer_reads_the_same_from_either_type_where_values_are_the_same(
    layer: LayersKernel,
) -> None:
    x = torch.randn(NUM_TOKENS, WIDTH)
    k, v = (torch.randn(6, BLOCK, KV_HEADS, DIM).bfloat16() for _ in "kv")
    elsewhere = torch.arange(NUM_TOKENS) + 4 * BLOCK  # what it writes is not what it reads
    wanted = run(layer, x, filled(torch.float32, k, v), elsewhere)
    assert torch.equal(run(layer, x, filled(torch.bfloat16, k, v), elsewhere), wanted)
    k.flatten(0, 1)[2 * BLOCK] += 1
    assert not torch.equal(run(layer, x, filled(torch.bfloat16, k, v), elsewhere), wanted)


def test_a_token_has_the_same_bits_alone_and_among_more_than_are_in_hand(
    layer: LayersKernel,
) -> None:
    at_once = layer._parts[0].both.rows_at_once
    x = torch.randn(2 * at_once + 5, WIDTH)
    pool = KvPool(KvShape(1, KV_HEADS, DIM, 1, torch.float32), len(x), torch.device("cpu"))
    tables = torch.ones(len(x), DIM // 2), torch.zeros(len(x), DIM // 2)
    ones = np.ones(len(x), dtype=np.int64)

    def tokens(first: int, end: int) -> torch.Tensor:
        """Each of its own sequence, which has no other."""
        blocks = np.arange(first, end)
        rows = PagedRows.of(blocks[:, None], ones[first:end], ones[first:end])
        at = slice(first, end)
        own = tables[0][at], tables[1][at]
        return layer.run(x[at], [own], pool, rows, torch.arange(first, end))

    together = tokens(0, len(x))
    for token in (0, at_once - 1, at_once, 2 * at_once, len(x) - 1):
        assert torch.equal(tokens(token, token + 1)[0], together[token])


class Three:
    """Sequences of 30, 1 and 9 tokens, of which the first has 4 and the second 6 before these."""

    queries, contexts = np.array([30, 1, 9]), np.array([34, 7, 9])
    tables = np.arange(27).reshape(3, 9)

    def __init__(self) -> None:
        ends = np.cumsum(self.queries)
        self.num_tokens = int(ends[-1])
        owner = np.repeat(np.arange(3), self.queries)
        at = np.arange(self.num_tokens) - (ends - self.contexts)[owner]
        self.slots = torch.from_numpy(self.tables[owner, at // BLOCK] * BLOCK + at % BLOCK)
        angles = torch.from_numpy(at)[:, None] * 10.0 ** -torch.arange(DIM / 2)
        self.turns = (angles.cos(), angles.sin())
        self.rows = PagedRows.of(self.tables, self.queries, self.contexts)
        self.ends = ends - 1
        self.x = torch.randn(self.num_tokens, WIDTH)
        self.before = torch.randn(27, BLOCK, KV_HEADS, DIM)

    def last_of(self, *sequences: int) -> NeededTokens:
        some = list(sequences)
        ones = np.ones(len(some), dtype=np.int64)
        return NeededTokens(
            self.ends[some], PagedRows.of(self.tables[some], ones, self.contexts[some])
        )

    def through(
        self, kernels: Library, layers: list[LayerParts], needed: NeededTokens | None
    ) -> list[torch.Tensor]:
        """The states behind these layers, and what is in the pool then."""
        pool = KvPool(KvShape(2, KV_HEADS, DIM, BLOCK, torch.float32), 27, torch.device("cpu"))
        for kind in (*pool.keys, *pool.values):
            kind[:] = self.before
        kernel = LayersKernel(kernels, dict(enumerate(layers)), Room())
        turns = [self.turns] * len(layers)
        return [
            kernel.run(self.x, turns, pool, self.rows, self.slots, needed),
            *pool.keys,
            *pool.values,
        ]


@pytest.fixture
def two(kernels: Library) -> list[LayerParts]:
    draw = torch.Generator().manual_seed(2)
    return [random_layer(Packer(kernels), SIZE, draw) for _ in range(2)]


@pytest.mark.parametrize("sequences", [(), (0,), (1,), (0, 2), (0, 1, 2)])
def test_needed_tokens_have_the_bits_that_they_have_among_all(
    kernels: Library, two: list[LayerParts], sequences: tuple[int, ...]
) -> None:
    three = Three()
    states, *pool = three.through(kernels, two, None)
    before_the_last = three.through(kernels, two[:1], None)[0]
    got, *got_pool = three.through(kernels, two, three.last_of(*sequences))
    needed = torch.zeros(three.num_tokens, dtype=torch.bool)
    needed[three.ends[list(sequences)]] = True
    assert torch.equal(got[needed], states[needed])
    assert torch.equal(got[~needed], before_the_last[~needed])
    assert all(map(torch.equal, got_pool, pool))


@pytest.mark.parametrize("part", [1, 2])
def test_a_token_that_is_not_needed_is_nan_where_its_k_or_v_is_not_finite(
    kernels: Library, two: list[LayerParts], part: int
) -> None:
    three, broken = Three(), 11
    three.x[:, 0] = 1
    three.x[broken, 0] = 1e20
    draw = torch.Generator().manual_seed(3)
    qkv = [torch.randn(size, WIDTH, generator=draw) for size in two[0].qkv.sizes]
    qkv[part][5, 0] = 1e30  # only together with such a state does it overflow
    layer = replace(two[0], norms=(None, *two[0].norms[1:]), qkv=Packer(kernels).pack(qkv))
    got = three.through(kernels, [layer], three.last_of(1, 2))[0]
    is_nan = got.isnan().any(-1)
    assert is_nan.nonzero().flatten().tolist() == [broken]
