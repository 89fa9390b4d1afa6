"""What the comparison knows of a contestant: how it is set up, started, and asked."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.load import Target, run_load
from benchmarks.timeline import Report
from benchmarks.workload import Workload

# For GCC's OpenMP: threads that wait for each other spin for a moment only. As a default they spin
# so long that a step stands still when a server's other threads, or who asks it, want a core.
SHORT_SPIN = {"GOMP_SPINCOUNT": "10000"}
# Of the weights as they are served; they are stored as bfloat16.
PRECISIONS = ("bf16", "f32", "int8", "int4")


class Running(Protocol):
    """A contestant that is loaded: a server behind its URL, or a loop in a process."""

    def measure(self, workload: Workload, streams: int, requests: int) -> Report:
        """A closed loop of so many streams over `requests` prompts; all have to be answered."""

    def facts(self) -> dict[str, Any]:
        """What it says of itself, for the record."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A contestant.

    Attributes:
        precisions: of its weights, among PRECISIONS; the others it can't be asked for.
        set_up: installs and converts for one precision; done once, then it returns at once.
        running: loads it, and ends it with the block. Set up before.
    """

    name: str
    precisions: tuple[str, ...]
    set_up: Callable[[str], None]
    running: Callable[[str], AbstractContextManager[Running]]


@dataclass(frozen=True, slots=True)
class HttpServer:
    """A `Running` behind a URL."""

    target: Target
    about: dict[str, Any]

    def measure(self, workload: Workload, streams: int, requests: int) -> Report:
        return run_load(self.target, workload, streams, requests)

    def facts(self) -> dict[str, Any]:
        return self.about
