"""Prometheus and promtool for tests, from Debian's package `prometheus`.

`python -m tests.prometheus` installs it where it is missing, as CI does.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_START_S = 60.0
_LISTENS = re.compile(r'msg="Listening on" address=(\S+)')


def program(name: str) -> str:
    """The path of promtool or prometheus; installed with apt-get where it is missing."""
    if shutil.which(name) is None:
        install()
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"there is no {name}: apt-get install prometheus")
    return found


def install() -> None:
    """Debian's package; needs root."""
    if os.geteuid() != 0:
        raise RuntimeError("Prometheus is missing: apt-get install prometheus")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", "prometheus"]):
        subprocess.run(["apt-get", *command], check=True, env=environment, capture_output=True)


class Prometheus:
    """A running server, asked over HTTP.

    Args:
        url: of its API.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant vector now. Raises HTTPError where it can't be evaluated."""
        data = self._get("query", query=expression)
        result: list[dict[str, Any]] = data["result"]
        return result

    def rules(self) -> list[dict[str, Any]]:
        """Every rule with its health."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def _get(self, what: str, **parameters: str) -> dict[str, Any]:
        url = f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as response:
            data: dict[str, Any] = json.load(response)["data"]
        return data


@contextlib.contextmanager
def running_prometheus(config: str) -> Iterator[Prometheus]:
    """A server with a prometheus.yml, on a free loopback port, its data gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="infermesh-prometheus-") as name:
        folder = Path(name)
        (folder / "prometheus.yml").write_text(config)
        flags = ("--web.listen-address=127.0.0.1:0", f"--storage.tsdb.path={folder / 'data'}")
        command = [program("prometheus"), f"--config.file={folder / 'prometheus.yml'}", *flags]
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield Prometheus(_url(server, folder / "log"))
        finally:
            server.terminate()
            server.wait(60)


def _url(server: "subprocess.Popen[bytes]", log: Path) -> str:
    """Where it listens, as its log says."""
    deadline = time.monotonic() + _START_S
    while not (found := _LISTENS.search(log.read_text())):
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(log.read_text())
        time.sleep(0.05)  # a poll: the server tells nobody where it listens
    return f"http://{found[1]}"


if __name__ == "__main__":
    print(program("promtool"))
