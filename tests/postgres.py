"""A private PostgreSQL for tests: a throw-away cluster on a unix socket, run as an ordinary user.

`python -m tests.postgres` installs Debian's packages where they are missing, as CI does.
"""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PLACES = "/usr/lib/postgresql/*/bin/initdb"
_USER = "infermesh"
_START_S = 60.0


def programs() -> Path:
    """The folder with initdb and postgres; installed with apt-get where it is missing."""
    found = _find()
    if found is None:
        install()
        found = _find()
    if found is None:
        raise RuntimeError("there is no initdb: apt-get install postgresql")
    return found


def install() -> None:
    """Debian's packages; needs root."""
    if os.geteuid() != 0:
        raise RuntimeError("PostgreSQL is missing: apt-get install postgresql")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", "postgresql"]):
        subprocess.run(["apt-get", *command], check=True, env=environment, capture_output=True)


class Postgres:
    """A running cluster.

    Args:
        folder: of its data and its socket, owned by the user that runs it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bin = programs()
        self._count = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Makes the cluster and waits until it answers."""
        # PostgreSQL refuses to run as root
        user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        if os.geteuid() == 0:
            shutil.chown(self._folder, user)
        data = self._folder / "data"
        log = (self._folder / "log").open("ab")
        initdb = [self._bin / "initdb", "-D", data, "-U", _USER, "-A", "trust", "-E", "UTF8"]
        if not data.exists():
            subprocess.run(
                [*initdb, "--no-sync", "--locale=C"], check=True, stdout=log, stderr=log, user=user
            )
        settings = ("listen_addresses=", f"unix_socket_directories={self._folder}", "fsync=off")
        flags = [word for setting in settings for word in ("-c", setting)]
        self._process = subprocess.Popen(
            [self._bin / "postgres", "-D", data, *flags],
            stdout=log,
            stderr=log,
            user=user,
            cwd=self._folder,
        )
        log.close()
        deadline = time.monotonic() + _START_S
        while self._psql("SELECT 1", check=False) != 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._folder / "log").read_text())
            time.sleep(0.05)  # a poll: the server tells nobody that it is ready

    def stop(self) -> None:
        """Ends it."""
        if self._process is not None:
            # fast shutdown: sessions are ended, not waited for
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)

    def create_database(self, copy_of: str = "") -> str:
        """The URL of a new database: empty, or a copy of one to which nobody is connected."""
        self._count += 1
        name = f"test_{self._count}"
        template = f" TEMPLATE {_name_of(copy_of)}" if copy_of else ""
        self._psql(f"CREATE DATABASE {name}{template}")
        return f"postgresql://{_USER}@/{name}?host={self._folder}"

    def make_read_only(self, url: str) -> None:
        """New sessions on a database may only read."""
        self._psql(f"ALTER DATABASE {_name_of(url)} SET default_transaction_read_only = on")

    def _psql(self, statement: str, *, check: bool = True) -> int:
        command = [self._bin / "psql", "-h", self._folder, "-U", _USER, "-d", "postgres", "-qc"]
        return subprocess.run([*command, statement], check=check, capture_output=True).returncode


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A cluster inside the block."""
    # not below pytest's folder, which other users can't enter; and short, for the socket's path
    with tempfile.TemporaryDirectory(prefix="infermesh-pg-") as folder:
        cluster = Postgres(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def _name_of(url: str) -> str:
    """The database that a URL of `create_database` names."""
    return url.partition("@/")[2].partition("?")[0]


def _find() -> Path | None:
    found = sorted(Path("/").glob(_PLACES.lstrip("/")))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


if __name__ == "__main__":
    print(programs())
