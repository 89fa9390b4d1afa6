"""What sampling costs: each setting by torch and by the C++ kernel, beside torch's own argmax of
the same logits, and beside an older commit of this repository where one is named.

Each contestant is a process of its own with one thread, whose processor time counts, so that what
else runs here does not. They take turns within each round, on the same logits: normal ones ("flat":
thousands of tokens are likely), or such of which one stands out and is as good as certain
("peaked").
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import ROOT, describe, keep
from benchmarks.paired import paired_ratio
from infermesh.config import ShardConfig
from services.shard import host
from services.shard.domain import NewSequence, Sampling, Slot
from services.shard.history import TokenHistory
from services.shard.sampler import sample
from services.shard.slots import ActiveRow, SequenceState

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 20, top_p 0.8": {"top_k": 20, "top_p": 0.8},
    "min_p 0.05": {"min_p": 0.05},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5},
    "greedy, logprobs": {"temperature": 0.0, "top_logprobs": 5},
}
ROWS = (1, 8, 32)
VOCABS = (32_000, 151_936)
# Of the logits, and by how much the likeliest exceeds the next.
SPREADS = {"flat": 1.0, "peaked": 2.0}
STANDING_OUT = {"flat": 0.0, "peaked": 12.0}
HISTORY = 600  # tokens that penalties look at, half of them output


def make_rows(count: int, setting: str, vocab: int) -> list[ActiveRow]:
    """As the slot table would make them."""
    sampling = [Sampling(seed=i, **SETTINGS[setting]) for i in range(count)]
    tokens = np.random.default_rng(0).integers(0, vocab, HISTORY).tolist()
    half = HISTORY // 2
    history = TokenHistory(tokens[:half], tokens[half:]) if sampling[0].penalizes else None
    return [
        ActiveRow(
            i, SequenceState(NewSequence(Slot(i), (), 0, half, 0, s), 0, 0, history), (1,), i, True
        )
        for i, s in enumerate(sampling)
    ]


def make_logits(rows: int, vocab: int, kind: str) -> torch.Tensor:
    """[rows, vocab] float32."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows))
    logits *= SPREADS[kind]
    places = torch.arange(rows) * 37 % vocab
    logits[torch.arange(rows), places] += STANDING_OUT[kind] + logits.amax(-1)
    return logits


def serve(way: str) -> None:
    """Measures one call of each case that is asked for on stdin."""
    torch.set_num_threads(1)
    extra: tuple[Any, ...] = ()
    if way == "kernel":
        from services.shard.kernels.library import load
        from services.shard.kernels.sampling import SamplingKernel
        from services.shard.torch_loading import DEFAULT_FOLDER

        folder = Path(ShardConfig().kernels_dir or DEFAULT_FOLDER).expanduser()
        extra = (SamplingKernel(load(folder, lambda: None)),)
    gc.disable()
    current: tuple[Any, ...] = ()
    for line in sys.stdin:
        case = tuple(json.loads(line))
        if case != current:
            rows, vocab, kind, setting = current = case
            logits, asked = make_logits(rows, vocab, kind), make_rows(rows, setting, vocab)
        with torch.inference_mode():
            began = time.process_time()
            if way == "argmax":
                logits.argmax(dim=-1)
            else:
                sample(logits, asked, *extra)
            took = time.process_time() - began
        print(took, flush=True)


@dataclass(frozen=True, slots=True)
class Contestant:
    """A process that measures."""

    process: "subprocess.Popen[str]"

    def measure(self, case: tuple[Any, ...]) -> float:
        """Processor seconds of one call."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(case), file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


@contextmanager
def contestant(way: str, checkout: Path) -> Iterator[Contestant]:
    """This file over the services of a checkout."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", way],
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Contestant(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


def check_out(commit: str, folder: Path) -> Path:
    """The tree of a commit."""
    packed = subprocess.run(
        ["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    subprocess.run(["tar", "x", "-C", str(folder)], input=packed.stdout, check=True)
    return folder


def compare(
    case: tuple[Any, ...], contestants: dict[str, Contestant], rounds: int
) -> dict[str, Any]:
    """Medians, and paired ratios to argmax and to what was before."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        order = list(contestants.items())
        for name, one in order if number % 2 else order[::-1]:
            took = one.measure(case)
            if number:  # the first warms up
                times[name].append(took)
    found: dict[str, Any] = dict(zip(("rows", "vocab", "logits", "setting"), case, strict=True))
    found["median_us"] = {n: round(1e6 * statistics.median(v), 1) for n, v in times.items()}
    for base in ("argmax", "before"):
        found[f"ratio_to_{base}"] = {
            name: [ratio.median, ratio.low, ratio.high]
            for name in times
            if base in times and name not in ("argmax", "before", base)
            for ratio in [paired_ratio(list(zip(times[name], times[base], strict=True)))]
        }
    return found


def line_of(found: dict[str, Any]) -> str:
    """For a person: microseconds, and how many times what it is compared with."""
    cells = [f"{name} {value:>10.1f}" for name, value in found["median_us"].items()]
    for base in ("argmax", "before"):
        for name, (median, low, high) in found[f"ratio_to_{base}"].items():
            cells.append(f"{name}/{base} {median:.3f} ({low:.3f} to {high:.3f})")
    case = f"{found['rows']:>2} x {found['vocab']:>6} {found['logits']:6} {found['setting']:20}"
    return f"{case} {'  '.join(cells)}"


def main() -> None:
    """Parses the flags, measures, prints a line per case, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--vocabs", type=int, nargs="+", default=list(VOCABS))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--before", help="a commit to compare with")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    host.prepare_process()
    if flags.serve:
        serve(flags.serve)
        return
    cases = [
        (rows, vocab, kind, setting)
        for rows in flags.rows
        for vocab in flags.vocabs
        for kind in SPREADS
        for setting in flags.settings
    ]
    with ExitStack() as stack:
        checkouts = {"argmax": ROOT, "torch": ROOT, "kernel": ROOT}
        if flags.before:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            checkouts["before"] = check_out(flags.before, folder)
        contestants = {
            name: stack.enter_context(contestant(name, checkout))
            for name, checkout in checkouts.items()
        }
        results = []
        for case in cases:
            results.append(compare(case, contestants, flags.rounds))
            print(line_of(results[-1]), flush=True)
    about = {"threads": 1, "rounds": flags.rounds, "before": flags.before}
    keep({"machine": describe(), **about, "results": results}, flags.json)


if __name__ == "__main__":
    main()
