"""The compiled paged attention beside the torch path: one layer's K and V written and attended to.

Both take turns on the same pool, blocks shuffled. With one thread it is the thread's CPU time that
counts, so that it can be measured beside other work; with more it is the clock's.
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
        self._pools = [torch.randn(size).to(dtype) for _ in range(2)]
        tokens = rows * queries
        self._new = [torch.randn(tokens, *size[2:]).to(dtype) for _ in range(2)]
        self._q = torch.randn(tokens, shape.num_heads, shape.head_dim).to(dtype)
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
        self._kernels.write(*self._pools, self._slots, *self._new)
        return self._kernels.attend(self._q, *self._pools, self._rows, self._rules, None)

    def torch(self) -> torch.Tensor:
        """One layer without them, as ForwardPass runs it."""
        for pool, states in zip(self._pools, self._new, strict=True):
            pool.flatten(0, 1).index_copy_(0, self._slots, states)
        return attend(self._q, *self._pools, self._layout, self._rules, None, self._scratch)


def seconds(run: Callable[[], torch.Tensor], repeats: int) -> float:
    """Of one run, when it is repeated."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats


def measure(layer: Layer, rounds: int) -> dict[str, Any]:
    """Alternates the two; the ratio is how often the kernels' time goes into torch's."""
    torch.testing.assert_close(layer.compiled(), layer.torch(), rtol=1e-2, atol=1e-2)
    repeats = max(1, min(100, int(0.02 / seconds(layer.compiled, 2))))
    pairs = []
    for number in range(rounds):
        order = (layer.torch, layer.compiled) if number % 2 else (layer.compiled, layer.torch)
        times = {run.__name__: seconds(run, repeats) for run in order}
        pairs.append((times["torch"], times["compiled"]))
    ratio = paired_ratio(pairs)
    return {
        "torch_us": round(1e6 * statistics.median(old for old, _ in pairs), 1),
        "compiled_us": round(1e6 * statistics.median(new for _, new in pairs), 1),
        "ratio": ratio.median,
        "ratio_95": [ratio.low, ratio.high],
    }


def main() -> None:
    """Parses the flags, measures, prints, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    library = load(Path.home() / ".cache/infermesh/kernels", lambda: print("compiling"))
    result: dict[str, Any] = {"machine": describe(), "threads": flags.threads}
    with torch.inference_mode():
        for dtype in flags.dtypes:
            for shape in SHAPES:
                for work in WORK:
                    name = f"{shape.name} {dtype}: {work[0]} × {work[1]} of {work[2]}"
                    layer = Layer(library, shape, work, getattr(torch, dtype))
                    result[name] = measure(layer, flags.rounds)
                    print(name, json.dumps(result[name]), flush=True)
    keep(result, flags.json)


if __name__ == "__main__":
    main()
