"""A private Redis for tests: a server on a unix socket, without a port, killed and started at will.

`python -m tests.redis_server` installs Debian's package where it is missing, as CI does.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis

_START_S = 30.0
# One per test, so that none sees another's.
_NUM_DATABASES = 10_000


def program() -> str:
    """redis-server; installed with apt-get where it is missing."""
    if shutil.which("redis-server") is None:
        install()
    found = shutil.which("redis-server")
    if found is None:
        raise RuntimeError("there is no redis-server: apt-get install redis-server")
    return found


def install() -> None:
    """Debian's package; needs root."""
    if os.geteuid() != 0:
        raise RuntimeError("Redis is missing: apt-get install redis-server")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", "redis-server"]):
        subprocess.run(["apt-get", *command], check=True, env=environment, capture_output=True)


class RedisServer:
    """One server; what it keeps is gone when it is stopped, unless told otherwise.

    Args:
        folder: of its socket; short, for the socket's path.
        arguments: further settings, as on redis-server's command line.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._folder = folder
        self._arguments = arguments
        self._count = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def path(self) -> Path:
        return self._folder / "redis.sock"

    def url(self, database: int = 0, password: str = "") -> str:
        """Of one of its databases."""
        user = f":{password}@" if password else ""
        return f"unix://{user}{self.path}?db={database}"

    def new_database(self) -> str:
        """The URL of a database that nobody has used."""
        self._count += 1
        return self.url(self._count)

    def start(self) -> None:
        """Waits until it answers."""
        settings = {
            "port": "0",
            "unixsocket": str(self.path),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "databases": str(_NUM_DATABASES),
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [program(), *flags, *self._arguments], stdout=log, stderr=log
            )
        deadline = time.monotonic() + _START_S
        while not _answers(self.path):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._folder / "log").read_text())
            time.sleep(0.02)  # a poll: the server tells nobody that it is ready

    def signal(self, number: signal.Signals) -> None:
        """Stops, continues or kills it."""
        assert self._process is not None, "it was started"
        self._process.send_signal(number)

    def kill(self) -> None:
        """Gone at once; started again it is empty."""
        self.signal(signal.SIGKILL)
        assert self._process is not None, "it was started"
        self._process.wait(30)

    def stop(self) -> None:
        """Ends it, frozen or not."""
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def client(self, url: str) -> "redis.Redis":
        """For a test's own looks."""
        return redis.Redis.from_url(url)


@contextlib.contextmanager
def running_redis(*arguments: str) -> Iterator[RedisServer]:
    """A server inside the block."""
    with tempfile.TemporaryDirectory(prefix="infermesh-redis-") as folder:
        server = RedisServer(Path(folder), *arguments)
        try:
            server.start()
            yield server
        finally:
            server.stop()


def _answers(path: Path) -> bool:
    """Without the library, which would try again in its own time."""
    with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
        client.connect(str(path))
        client.sendall(b"PING\r\n")
        return client.recv(64).startswith((b"+PONG", b"-NOAUTH"))
    return False


if __name__ == "__main__":
    print(program())
