"""transformers, which the project has anyway: `generate` on the same weights, in process."""

import contextlib
import sys
from collections.abc import Iterator

from benchmarks.local_mesh import ROOT
from benchmarks.peers.driven_process import driven
from benchmarks.peers.model import model_directory
from benchmarks.peers.peer import SHORT_SPIN, Peer, Running

DTYPES = {"bf16": "bfloat16", "f32": "float32"}


def set_up(precision: str) -> None:
    """The weights; the library is among the project's own."""
    model_directory()


@contextlib.contextmanager
def running(precision: str) -> Iterator[Running]:
    """The loop of `drivers.transformers_loop`."""
    arguments = (str(model_directory()), DTYPES[precision])
    command = (sys.executable, "-m", "benchmarks.peers.drivers.transformers_loop", *arguments)
    with driven(command, ROOT, SHORT_SPIN) as loop:
        yield loop


PEER = Peer("transformers", tuple(DTYPES), set_up, running)
