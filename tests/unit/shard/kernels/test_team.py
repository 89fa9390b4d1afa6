"""Threads that are late change no bit and hold up nobody."""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from services.shard.kernels.layers import LayersKernel, Room
from services.shard.kernels.library import Library
from services.shard.kernels.paged import PagedRows
from services.shard.kernels.products import Packer
from services.shard.kv_pool import KvPool, KvShape
from tests.compiled_kernels import needs_kernels, with_late_threads
from tests.random_layers import LayerSize, random_codes, random_layer, random_matrix

pytestmark = needs_kernels
WIDTH, HEADS, KV_HEADS, DIM, HIDDEN, BLOCK = 256, 8, 2, 32, 640, 16
LAYERS = 6
ANYONE = -1
BEFORE, COMPUTED, WRITING = 1, 2, 4
EVER = BEFORE | COMPUTED | WRITING


@dataclass(frozen=True)
class Late:
    """Kernels whose threads can be made late."""

    library: Library
    make: Callable[[int, int, int, int], None]


@pytest.fixture(scope="module")
def late_kernels() -> Late:
    library = with_late_threads()
    return Late(library, library.function("make_late", *(ctypes.c_int64,) * 4))


@pytest.fixture
def late(late_kernels: Late) -> Iterator[Late]:
    yield late_kernels
    late_kernels.make(0, 0, 0, 1)


def layers(library: Library, seed: int, *, quantized: bool = False) -> LayersKernel:
    draw, packer = torch.Generator().manual_seed(seed), Packer(library)
    matrix = random_codes if quantized else random_matrix
    size = LayerSize(WIDTH, HEADS, KV_HEADS, DIM, HIDDEN)
    parts = {number: random_layer(packer, size, draw, matrix) for number in range(LAYERS)}
    return LayersKernel(library, parts, Room())


class Batch:
    """Sequences of random lengths, each with some tokens to compute."""

    def __init__(self, draw: random.Random, *, rows: int, most_tokens: int, most_before: int):
        queries = [draw.randint(1, most_tokens) for _ in range(rows)]
        contexts = [count + draw.randint(0, most_before) for count in queries]
        width = -(-max(contexts) // BLOCK)
        tables = np.arange(rows * width).reshape(rows, width)
        self.num_blocks = rows * width
        self.rows = PagedRows.of(tables, np.array(queries), np.array(contexts))
        positions = [
            context - count + i
            for count, context in zip(queries, contexts, strict=True)
            for i in range(count)
        ]
        owners = [row for row, count in enumerate(queries) for _ in range(count)]
        self.slots = torch.tensor(
            [
                int(tables[row, at // BLOCK]) * BLOCK + at % BLOCK
                for row, at in zip(owners, positions, strict=True)
            ]
        )
        angles = torch.tensor(positions)[:, None] * 10.0 ** -torch.arange(DIM / 2)
        self.tables = angles.cos(), angles.sin()
        self.x = torch.randn(len(positions), WIDTH)
        shape = (self.num_blocks, BLOCK, KV_HEADS, DIM)
        self.before = [torch.randn(shape) for _ in range(2)]

    def through(self, kernel: LayersKernel) -> list[torch.Tensor]:
        """The states behind the layers, and what is in the pool then."""
        shape = KvShape(LAYERS, KV_HEADS, DIM, BLOCK, torch.float32)
        pool = KvPool(shape, self.num_blocks, torch.device("cpu"))
        for kind, before in zip((pool.keys, pool.values), self.before, strict=True):
            for number in range(LAYERS):
                kind[number][:] = before
        out = kernel.run(self.x, [self.tables] * LAYERS, pool, self.rows, self.slots)
        return [out, *pool.keys, *pool.values]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("threads", [2, 5])
def test_late_threads_change_no_bit(
    kernels: Library, late: Late, threads: int, quantized: bool
) -> None:
    draw, seed = random.Random(), random.randrange(1 << 30)
    print(f"seed {seed}")
    draw.seed(seed)
    torch.manual_seed(seed)
    on_time = layers(kernels, seed, quantized=quantized)
    delayed = layers(late.library, seed, quantized=quantized)
    before = late.library.num_helped()
    for rows, most_tokens, most_before in ((1, 1, 3000), (8, 1, 200), (3, 90, 40), (1, 300, 0)):
        batch = Batch(draw, rows=rows, most_tokens=most_tokens, most_before=most_before)
        torch.set_num_threads(1)
        wanted = batch.through(on_time)
        torch.set_num_threads(threads)
        for moments in (EVER, BEFORE, COMPUTED, WRITING):
            late.make(ANYONE, moments, draw.randint(1, 300), draw.choice((2, 5, 20)))
            for got, right in zip(batch.through(delayed), wanted, strict=True):
                assert torch.equal(got, right)
    assert late.library.num_helped() > before


@pytest.mark.parametrize("member", [0, 1])
def test_nobody_waits_for_a_thread_that_is_late(late: Late, member: int) -> None:
    """The one that asked is no exception. Whoever gets no core in time is not late with anything,
    so on a busy machine it takes several runs."""
    kernel = layers(late.library, seed=3)
    batch = Batch(random.Random(3), rows=4, most_tokens=96, most_before=60)

    def seconds() -> float:
        start_s = time.perf_counter()
        batch.through(kernel)
        return time.perf_counter() - start_s

    torch.set_num_threads(2)
    late_s = max(0.01, *(seconds() for _ in range(3)))  # as long as all layers take
    late.make(member, COMPUTED, round(late_s * 1e6), 1)
    loops = 5 * LAYERS  # at least: four products and the attention
    waited_s = loops * late_s
    taken_s = []
    for _ in range(30):
        before = late.library.num_helped()
        run_s = seconds()
        if late.library.num_helped() > before:
            taken_s.append(run_s)
        if len(taken_s) >= 3 and min(taken_s) < waited_s / 3:
            break
    assert len(taken_s) >= 3
    assert min(taken_s) < waited_s / 3


def test_a_thread_that_is_about_to_write_is_waited_for(late: Late) -> None:
    kernel = layers(late.library, seed=4)
    batch = Batch(random.Random(4), rows=4, most_tokens=1, most_before=60)
    torch.set_num_threads(2)
    wanted = batch.through(kernel)
    late.make(1, WRITING, 20_000, 20)
    for got, right in zip(batch.through(kernel), wanted, strict=True):
        assert torch.equal(got, right)
