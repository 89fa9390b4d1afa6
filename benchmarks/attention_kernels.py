"""The compiled paged attention beside the torch path, over pools of float32 and of bfloat16: one
layer's K and V written and attended to.

All take turns, on pools of their own with the same blocks, shuffled. Between kernels a model is
float32, without them of its pool's type. With one thread it is the thread's CPU time that counts,
so that it can be measured beside other work; with more it is the clock's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe, keep
from benchmarks.paired import paired_ratio
from services.shard.attention import ScoreRules, attend
from services.shard.attention_plan import AttentionLayout
from services.shard.kernels.library import Library, load
from services.shard.kernels.paged import PagedAttention, PagedRows
from services.shard.scratch import Scratch

BLOCK = 16
DTYPES = ("float32", "bfloat16")
SAMPLE_S = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer's heads."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = (Shape("qwen2.5-0.5b", 14, 2, 64), Shape("llama-3.2-1b", 32, 8, 64))
# (rows, query tokens, context)
WORK = [(rows, 1, context) for context in (200, 2000) for rows in (1, 8, 32)] + [(1, 512, 512)]


class Layer:
    """Both paths over one pool."""

    def __init__(
        self, library: Library, shape: Shape, work: tuple[int, int, int], dtype: torch.dtype
    ) -> None:
        rows, queries, context = work
        blocks = -(-context // BLOCK)
        size = (rows * blocks, BLOCK, shape.num_kv_heads, shape.head_dim)
        tables = np.random.default_rng(0).permutation(rows * blocks).reshape(rows, blocks)
        lens = (np.full(rows, queries), np.full(rows, context))
        positions = np.arange(context - queries, context)
        slots = tables[:, positions // BLOCK] * BLOCK + positions % BLOCK
        self._slots = torch.from_numpy(slots.reshape(-1))
        draw = torch.Generator().manual_seed(0)
        self._pools = [torch.randn(size, generator=draw).to(dtype) for _ in range(2)]
        tokens = rows * queries
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        wide = [torch.randn(tokens, n, shape.head_dim, generator=draw) for n in heads]
        self._wide, self._narrow = wide, [states.to(dtype) for states in wide]
        self._rules = ScoreRules(shape.head_dim**-0.5)
        self._kernels = PagedAttention(library, dtype)
        self._rows = PagedRows.of(tables, *lens)
        self._layout = AttentionLayout(
            tables,
            *lens,
            BLOCK,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            torch.device("cpu"),
        )
        self._scratch = Scratch(torch.device("cpu"))

    def compiled(self) -> torch.Tensor:
        """One layer with the kernels."""
        q, *states = self._wide
        self._kernels.write(*self._pools, self._slots, *states)
        return self._kernels.attend(q, *self._pools, self._rows, self._rules, None)

    def torch(self) -> torch.Tensor:
        """One layer without them, as ForwardPass runs it."""
        q, *new = self._narrow
        for pool, states in zip(self._pools, new, strict=True):
            pool.flatten(0, 1).index_copy_(0, self._slots, states)
        return attend(q, *self._pools, self._layout, self._rules, None, self._scratch)


def seconds(run: Callable[[], torch.Tensor], repeats: int) -> float:
    """Of one run, when it is repeated."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats


def measure(layers: dict[str, Layer], rounds: int) -> dict[str, Any]:
    """Medians of all, and what the kernels gain: over torch, and by the narrower pool."""
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    for dtype, layer in layers.items():
        got, wanted = layer.compiled(), layer.torch()
        torch.testing.assert_close(got, wanted.float(), rtol=1e-2, atol=1e-2)
        calls |= {f"torch {dtype}": layer.torch, f"compiled {dtype}": layer.compiled}
    repeats = {
        name: max(1, min(200, int(SAMPLE_S / seconds(run, 2)))) for name, run in calls.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        order = list(calls) if number % 2 else list(calls)[::-1]
        for name in order:
            samples[name].append(seconds(calls[name], repeats[name]))
    found: dict[str, Any] = {
        f"{name}_us": round(1e6 * statistics.median(taken), 1) for name, taken in samples.items()
    }
    pairs = [(f"torch {dtype}", f"compiled {dtype}") for dtype in layers]
    for slow, fast in (*pairs, ("compiled float32", "compiled bfloat16")):
        ratio = paired_ratio(list(zip(samples[slow], samples[fast], strict=True)))
        found[f"{slow} / {fast}"] = [ratio.median, ratio.low, ratio.high]
    return found


def main() -> None:
    """Parses the flags, measures, prints, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    library = load(Path.home() / ".cache/infermesh/kernels", lambda: print("compiling"))
    vectors = torch.backends.cpu.get_cpu_capability()
    result: dict[str, Any] = {
        "machine": describe(),
        "vectors": vectors,
        "threads": flags.threads,
    }
    with torch.inference_mode():
        for shape in SHAPES:
            for work in WORK:
                name = f"{shape.name}: {work[0]} × {work[1]} of {work[2]}"
                layers = {
                    dtype: Layer(library, shape, work, getattr(torch, dtype)) for dtype in DTYPES
                }
                result[name] = measure(layers, flags.rounds)
                print(name, json.dumps(result[name]), flush=True)
    keep(result, flags.json)


if __name__ == "__main__":
    main()
