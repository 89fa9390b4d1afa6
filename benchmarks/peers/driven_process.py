"""A peer without a server: a loop in a process of its own, asked in lines of JSON.

    → {"prompts": [[id, …], …], "streams": n, "output_tokens": n}
    ← {"wall_s": s, "timelines": [{"due_s": s, "chunks_s": [s, …], "ended_s": s}, …]}

Its first line says what it is, once it is loaded. The seconds are on a clock of its own. It pays
for neither HTTP nor text, so what it reports flatters it beside a server.
"""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.server_process import end
from benchmarks.timeline import Report, Timeline, report
from benchmarks.workload import Workload


class DrivenProcess:
    """A `Running` over a process's standard input and output."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self._facts = self._read()

    def facts(self) -> dict[str, Any]:
        return self._facts

    def measure(self, workload: Workload, streams: int, requests: int) -> Report:
        if workload.as_text or workload.temperature != 0:
            raise ValueError("a driven peer takes token ids, and is greedy")
        request = {
            "prompts": workload.prompts(requests),
            "streams": streams,
            "output_tokens": workload.output_tokens,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return _report(self._read(), workload)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the driver ended: {self._log.read_text()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _report(answer: dict[str, Any], workload: Workload) -> Report:
    """Raises RuntimeError where an answer has not all of its tokens."""
    done = []
    for one in answer["timelines"]:
        timeline = Timeline(one["due_s"], one["chunks_s"], one["ended_s"])
        timeline.output_tokens = len(timeline.chunks_s)
        if timeline.output_tokens != workload.output_tokens:
            raise RuntimeError(
                f"{timeline.output_tokens} tokens where {workload.output_tokens} were asked for"
            )
        done.append(timeline)
    return report(done, answer["wall_s"])


@contextlib.contextmanager
def driven(
    command: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None
) -> Iterator[DrivenProcess]:
    """The process, from when it is loaded to the end of the block."""
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield DrivenProcess(process, Path(log.name))
        finally:
            end(process)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
