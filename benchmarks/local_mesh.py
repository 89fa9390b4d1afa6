"""Starts `infermesh up` for a measurement and ends it: one mesh, free ports, its ready file."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[1]
PORTS = ("--port", "0", "--admin-port", "0", "--grpc-port", "0")


@contextlib.contextmanager
def local_mesh(*arguments: str, timeout_s: float = 300.0) -> Iterator[dict[str, Any]]:
    """The ready file's facts of a mesh that runs inside the block, and its `state_home`.

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
            yield {**json.loads(ready.read_text()), "state_home": folder}
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


@contextlib.contextmanager
def simulated_mesh(profile_us: Mapping[str, float], *arguments: str) -> Iterator[dict[str, Any]]:
    """The same without arithmetic and without a cache: steps take what the profile says."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as profile:
        profile.write(json.dumps(profile_us))
        profile.flush()
        engine = ("--engine", "simulated", "--set", f"shard.simulated_profile={profile.name}")
        with local_mesh("--no-cache", *engine, *arguments) as facts:
            yield facts


def samples(address: str) -> dict[str, float]:
    """A process's metrics without labels, by their names without the prefix.

    Args:
        address: host:port, as the ready file has it.
    """
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        sample.name.removeprefix("infermesh_"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }
