"""Starts `infermesh up` for a measurement and ends it: one mesh, free ports, its ready file."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PORTS = ("--port", "0", "--admin-port", "0", "--grpc-port", "0")


@contextlib.contextmanager
def local_mesh(*arguments: str, timeout_s: float = 300.0) -> Iterator[dict[str, Any]]:
    """The ready file's facts of a mesh that runs inside the block.

    Raises:
        RuntimeError: it did not come up; the message is what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        ready, output = Path(folder, "ready.json"), Path(folder, "output.txt")
        command = [sys.executable, "-m", "infermesh.cli", "up", *PORTS, "--ready-file", str(ready)]
        # state of its own: what the user's mesh has cached must not be found
        environment = {**os.environ, "XDG_STATE_HOME": folder}
        with output.open("w") as out:
            process = subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            deadline = time.monotonic() + timeout_s
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(output.read_text())
                time.sleep(0.01)
            yield json.loads(ready.read_text())
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
