"""The driver's side of `driven_process`: requests as lines of JSON in, timelines out.

Whatever else prints to standard output goes to standard error, so that lines stay lines.
"""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias


@dataclass
class Timeline:
    """Of one prompt; seconds. A chunk per token."""

    due_s: float
    chunks_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0


class ClosedLoop:
    """So many streams over the prompts of one request; who asks drives it."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.streams: int = request["streams"]
        self.output_tokens: int = request["output_tokens"]
        self._waiting: deque[list[int]] = deque(request["prompts"])
        self.timelines: list[Timeline] = []
        self._num_ended = 0

    @property
    def is_over(self) -> bool:
        """Every prompt was answered."""
        return not self._waiting and self._num_ended == len(self.timelines)

    def begin_due(self) -> list[tuple[list[int], Timeline]]:
        """What the streams that are free send now."""
        begun = []
        while self._waiting and len(self.timelines) - self._num_ended < self.streams:
            timeline = Timeline(time.perf_counter())
            self.timelines.append(timeline)
            begun.append((self._waiting.popleft(), timeline))
        return begun

    def end(self, timeline: Timeline) -> None:
        """An answer is complete; its stream is free."""
        timeline.ended_s = time.perf_counter()
        self._num_ended += 1


Loaded: TypeAlias = tuple[dict[str, Any], Callable[[ClosedLoop], None]]


def answer_requests(load: Callable[[], Loaded]) -> None:
    """Loads, says what is loaded, then runs one request after another until the input ends.

    Args:
        load: gives what the peer says of itself, and what runs one closed loop.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    facts, run = load()
    _write(out, facts)
    for line in sys.stdin:
        loop = ClosedLoop(json.loads(line))
        began = time.perf_counter()
        run(loop)
        wall_s = time.perf_counter() - began
        _write(out, {"wall_s": wall_s, "timelines": [asdict(one) for one in loop.timelines]})


def _write(out: Any, value: dict[str, Any]) -> None:
    out.write(json.dumps(value) + "\n")
    out.flush()
