"""Products with packed matrices beside torch's own, and beside a plain read of the same bytes;
and how exact they are.

The contestants of a matrix take turns; each goes through copies of its weights that together are
larger than the last cache, as a model's are. Several runs fill one JSON. One thread is measured by
its own time, which leaves out what else the machine does. On several, a machine that is not left
alone shows what a product takes in the least of many short samples only.
"""

import argparse
import ctypes
import itertools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from benchmarks.local_mesh import ROOT
from benchmarks.machine import describe, keep
from benchmarks.paired import paired_ratio
from services.shard.kernels.compiling import find_compiler
from services.shard.kernels.library import load
from services.shard.kernels.products import Packer
from services.shard.quantized_layers import Int4Matrix, Int8Matrix
from services.shard.row_codes import Codes

# Rows and columns of what a layer multiplies by, q/k/v and gate/up merged.
MATRICES = {
    "qwen2.5-0.5b": {
        "qkv": (1152, 896),
        "o": (896, 896),
        "gate_up": (9728, 896),
        "down": (896, 4864),
        "head": (151936, 896),
    },
    "llama-3.2-1b": {"qkv": (3072, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
}
OURS = ("float32", "bfloat16", "int8", "int4")
GROUP = 32
COPIES_BYTES = 96 << 20
OUTLIER, OUTLIER_EVERY = 100, 977
# With more rows, a contestant that takes this much longer than the fastest sits out.
HOPELESS = 12

Call = Callable[[torch.Tensor], object]


@dataclass(frozen=True, slots=True)
class Contestant:
    """A product that can be asked for again and again, each time with other weights.

    Attributes:
        calls: one per copy of the weights.
        num_bytes: of one copy.
    """

    name: str
    calls: list[Call]
    num_bytes: int


def contestants(packer: Packer, height: int, width: int, read: Any) -> Iterator[Contestant]:
    """All that multiply by one matrix, and the reads of the bytes of ours."""
    weight = torch.randn(height, width) / width**0.5
    half = weight.bfloat16()
    eight, four = (Codes.empty(height, width, group) for group in (0, GROUP))
    eight.quantize_(weight)
    four.quantize_(weight)
    for name, part in zip(OURS, (weight, half, eight, four), strict=True):
        packed = _copies(lambda part=part: packer.pack([part]))  # type: ignore[misc]
        yield Contestant(name, [matrix.multiply for matrix in packed], packed[0].num_bytes)
        size = packed[0].num_bytes
        blocks = [torch.ones(size, dtype=torch.uint8) for _ in range(_number(size))]
        yield Contestant(f"read {name}", [_reader(read, block) for block in blocks], size)
    plain = [weight.clone() for _ in range(_number(weight.nbytes))]
    yield Contestant("torch float32", [_linear(copy) for copy in plain], weight.nbytes)
    halves = [half.clone() for _ in range(_number(half.nbytes))]
    yield Contestant("torch bfloat16", [_linear(copy) for copy in halves], half.nbytes)
    ops: Any = torch.ops.mkldnn
    ready = [ops._reorder_linear_weight(weight, 1) for _ in plain]
    yield Contestant("onednn float32", [_prepacked(ops, copy) for copy in ready], weight.nbytes)
    for name, make, codes in (
        ("fbgemm int8", Int8Matrix, eight),
        ("torch int4", Int4Matrix, four),
    ):
        made = [make(codes) for _ in range(_number(codes.num_bytes))]
        yield Contestant(name, [matrix.multiply for matrix in made], codes.num_bytes)


def errors(packer: Packer, height: int, width: int) -> dict[str, dict[str, float]]:
    """Of products with codes, compared with float64 and relative to the results' spread; without
    and with columns of x that are much larger than the others, as activations have."""
    weight = torch.randn(height, width)
    found: dict[str, dict[str, float]] = {}
    for group, ours, name, theirs in (
        (0, "int8", "fbgemm int8", Int8Matrix),
        (GROUP, "int4", "torch int4", Int4Matrix),
    ):
        codes = Codes.empty(height, width, group)
        codes.quantize_(weight)
        products: dict[str, Call] = {
            ours: packer.pack([codes]).multiply,
            name: theirs(codes).multiply,
        }
        for label, size in (("even", 1), ("outliers", OUTLIER)):
            x = torch.randn(16, width)
            x[:, ::OUTLIER_EVERY] *= size
            wanted = x.double() @ codes.dequantized().double().T
            for contestant, product in products.items():
                got: Any = product(x)
                error = (got.double() - wanted).square().mean().sqrt() / wanted.std()
                found.setdefault(contestant, {})[label] = float(f"{float(error):.2g}")
    return found


def _copies(make: Callable[[], Any]) -> list[Any]:
    first = make()
    return [first, *(make() for _ in range(_number(first.num_bytes) - 1))]


def _number(num_bytes: int) -> int:
    return max(1, COPIES_BYTES // num_bytes)


def _linear(weight: torch.Tensor) -> Call:
    return lambda x: linear(x.to(weight.dtype), weight)


def _prepacked(ops: Any, weight: Any) -> Call:
    return lambda x: ops._linear_pointwise(x, weight, None, "none", [], "")


def _reader(read: Any, block: torch.Tensor) -> Call:
    seen = ctypes.c_int64()
    return lambda _: read(
        ctypes.c_void_p(block.data_ptr()),
        ctypes.c_int64(block.nbytes),
        torch.get_num_threads(),
        ctypes.byref(seen),
    )


def plain_read(folder: Path) -> Any:
    """The read, compiled for this machine."""
    library = folder / "plain_read.so"
    source = str(ROOT / "benchmarks" / "plain_read.cpp")
    command = [find_compiler(), "-O2", "-mavx2", "-fopenmp", "-shared", "-fPIC", source, "-o"]
    subprocess.run([*command, str(library)], check=True)
    return ctypes.CDLL(str(library)).plain_read


@torch.inference_mode()
def measure(
    field: Sequence[Contestant], x: torch.Tensor, rounds: int, sample_s: float
) -> dict[str, Any]:
    """Microseconds per product, and what each of ours takes of it."""
    field = [one for one in field if len(x) == 1 or not one.name.startswith("read")]
    turns = {one.name: itertools.cycle(one.calls) for one in field}
    trial = {one.name: _sample(turns[one.name], x, 2) for one in field}
    fastest = min(trial.values())
    if len(x) > 32:
        field = [one for one in field if trial[one.name] < HOPELESS * fastest]
    number = {one.name: max(1, round(sample_s / trial[one.name])) for one in field}
    samples: dict[str, list[float]] = {one.name: [] for one in field}
    for _ in range(rounds):
        for name, taken in samples.items():
            taken.append(_sample(turns[name], x, number[name]))
    found: dict[str, Any] = {}
    for one in field:
        ratios = {
            ours: paired_ratio(list(zip(samples[ours], samples[one.name], strict=True)))
            for ours in OURS
        }
        found[one.name] = {
            "microseconds": round(statistics.median(samples[one.name]) * 1e6, 1),
            "least": round(min(samples[one.name]) * 1e6, 1),
            "bytes": one.num_bytes,
            "of_it": {
                ours: [ratio.median, ratio.low, ratio.high] for ours, ratio in ratios.items()
            },
        }
    return found


def _sample(calls: Iterator[Call], x: torch.Tensor, number: int) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(number):
        next(calls)(x)
    return (clock() - start) / number


def show(title: str, found: dict[str, Any], work: int) -> None:
    """One line per contestant."""
    print(title)
    for name, result in found.items():
        micros, least = result["microseconds"], result["least"]
        ratios = "  ".join(f"{ours} {result['of_it'][ours][0]:.2f}" for ours in OURS)
        speed = f"{result['bytes'] / micros / 1e3:5.1f} GB/s {work / micros / 1e3:6.1f} GMAC/s"
        print(f"  {name:15} {micros:10.1f} µs (least {least:.1f}) {speed}", flush=True)
        print(f"    ours take of it: {ratios}", flush=True)


def main() -> None:
    """Runs the matrices and numbers of rows that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MATRICES, default=list(MATRICES))
    parser.add_argument("--matrices", nargs="+", default=["qkv", "o", "gate_up", "down", "head"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 128, 512])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--sample-ms", type=float, default=20.0, help="0: one product")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="what it holds of other cases stays")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    cases: dict[str, Any] = {}
    if flags.json and flags.json.exists():
        cases = json.loads(flags.json.read_text())["cases"]
    with tempfile.TemporaryDirectory() as folder:
        packer = Packer(load(Path(folder), lambda: print("compiling")))
        read = plain_read(Path(folder))
        for model, name in itertools.product(flags.models, flags.matrices):
            if name not in MATRICES[model]:
                continue
            height, width = MATRICES[model][name]
            field = list(contestants(packer, height, width, read))
            for rows in flags.rows:
                case = f"{model} {name} {height}x{width}, {rows} rows, {flags.threads} threads"
                x, sample_s = torch.randn(rows, width), flags.sample_ms / 1000
                cases[case] = measure(field, x, flags.rounds, sample_s)
                show(case, cases[case], rows * height * width)
            case = f"{model} {name} {height}x{width}, errors"
            cases[case] = errors(packer, height, width)
            print(case, cases[case], flush=True)
            keep({"machine": describe(), "cases": cases}, flags.json)


if __name__ == "__main__":
    main()
