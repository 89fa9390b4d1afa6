"""A whole mesh started as a user starts it, and the questions tests ask of it from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import openai
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "demo" / "model"
INFERMESH = (sys.executable, "-m", "infermesh.cli")
START_S = 120.0


def environment(tmp_path: Path) -> dict[str, str]:
    """The user's, with state of its own and no terminal width to depend on."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }


class Mesh:
    """`infermesh up` in a process group of its own.

    Args:
        tmp_path: for its state, output and ready file.
        arguments: flags beside the ports, which are free ones.
        python_path: a folder whose modules its processes find first.
    """

    def __init__(self, tmp_path: Path, *arguments: str, python_path: Path | None = None) -> None:
        self._clients: list[openai.OpenAI] = []
        self.tmp_path = tmp_path
        self.ready_file = tmp_path / "ready.json"
        self.output = tmp_path / "output.txt"
        ports = ("--port", "0", "--admin-port", "0", "--grpc-port", "0")
        command = (*INFERMESH, "up", *ports, "--ready-file", str(self.ready_file), *arguments)
        env = environment(tmp_path)
        if python_path is not None:
            env["PYTHONPATH"] = f"{python_path}:{env['PYTHONPATH']}"
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                command,
                cwd=tmp_path,
                env=env,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        try:
            wait_until(lambda: self.ready_file.exists() or self.process.poll() is not None, START_S)
            assert self.process.poll() is None, self.output.read_text() + self.logs()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            print(self.output.read_text()[-2000:], self.logs())
        self.close()

    def close(self) -> None:
        """Ends it as Ctrl-C does, or by force."""
        for client in self._clients:
            client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    @property
    def facts(self) -> dict[str, Any]:
        """The ready file as it stands."""
        facts: dict[str, Any] = json.loads(self.ready_file.read_text())
        return facts

    def service(self, name: str) -> dict[str, Any]:
        """The ready file's entry of one process."""
        return next(s for s in self.facts["services"] if s["name"] == name)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Sends a signal to one process; its pid."""
        pid: int = self.service(name)["pid"]
        os.kill(pid, number)
        return pid

    def wait_restarted(self, name: str, old_pid: int) -> None:
        """Until the supervisor has a new process of that name."""
        wait_until(lambda: self.service(name)["pid"] != old_pid, 60.0)

    def openai(self, **options: Any) -> openai.OpenAI:
        """The official client; closed with the mesh, if not before."""
        client = openai.OpenAI(
            base_url=f"{self.facts['url']}/v1", api_key=self.facts["api_key"], **options
        )
        self._clients.append(client)
        return client

    def async_openai(self, **options: Any) -> openai.AsyncOpenAI:
        """The official asynchronous client."""
        return openai.AsyncOpenAI(
            base_url=f"{self.facts['url']}/v1", api_key=self.facts["api_key"], **options
        )

    @property
    def bearer(self) -> list[tuple[str, str]]:
        """The key of its machine as a header, or as gRPC metadata."""
        return [("authorization", f"Bearer {self.facts['api_key']}")]

    @property
    def model(self) -> str:
        """The id of its first model."""
        model: str = self.facts["models"][0]
        return model

    def metric(self, service: str, name: str, **labels: str) -> float:
        """The sum of a metric's samples, as `service`'s Prometheus endpoint gives it."""
        url = (
            f"{self.facts['admin_url']}/metrics"
            if service == "gateway"
            else f"http://{self.service(service)['metrics']}/metrics"
        )
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        samples = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"infermesh_{name}"
            and all(sample.labels.get(key) == value for key, value in labels.items())
        ]
        assert samples, f"{service} exports no infermesh_{name}{labels}"
        return sum(samples)

    def logs(self) -> str:
        """The tail of every service's log."""
        found = sorted((self.tmp_path / "state").glob("infermesh/logs/*/*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in found)


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str = "") -> None:
    """Polls another process's state; there is no event to wait for across processes."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or condition}"
        time.sleep(0.02)  # a poll, see above


def run_infermesh(
    tmp_path: Path, *arguments: str, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """One `infermesh` command to its end."""
    return subprocess.run(
        (*INFERMESH, *arguments),
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def processes_naming(text: str) -> list[int]:
    """Pids whose command line has `text` in it."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:  # it ended meanwhile
                continue
            if text in command:
                found.append(int(folder.name))
    return found
