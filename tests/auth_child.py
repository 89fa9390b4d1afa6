"""The auth service as a process of its own, which can be killed and may be another version's."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parents[1]
_START_S = 60.0


class AuthChild:
    """`python -m services.auth`; started by `with`, or by `start`.

    Args:
        folder: of its sockets, and of its database where none is named.
        python_path: whose code it runs.
        prices: of all models, as in `auth.prices`.
    """

    def __init__(
        self, folder: Path, database_url: str = "", python_path: Path = ROOT, prices: str = ""
    ) -> None:
        self.database = folder / "auth.sqlite3"
        self.url = database_url or f"sqlite:///{self.database}"
        self.address = f"unix:{folder}/auth.sock"
        self.admin_address = f"unix:{folder}/admin.sock"
        self._folder = folder
        self._announced = folder / "announced.json"
        self._process: subprocess.Popen[bytes] | None = None
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(python_path),
            "INFERMESH_AUTH__DATABASE_URL": self.url,
            "INFERMESH_AUTH__ADDRESS": self.address,
            "INFERMESH_AUTH__ADMIN_ADDRESS": self.admin_address,
            "INFERMESH_TELEMETRY__ANNOUNCE_FILE": str(self._announced),
        }
        if prices:
            self._environment["INFERMESH_AUTH__PRICES"] = prices
        if (folder / "key").exists():
            self._environment["INFERMESH_AUTH__FIRST_KEY_FILE"] = str(folder / "key")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Until it serves."""
        self._announced.unlink(missing_ok=True)
        command = [sys.executable, "-m", "services.auth"]
        with (self._folder / "auth.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=self._environment, cwd=self._folder, stdout=log, stderr=log
            )
        deadline = time.monotonic() + _START_S
        while not self._announced.exists():
            said = (self._folder / "auth.log").read_text()
            assert self._process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.02)  # a poll: another process tells nobody that it is ready

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def wipe(self) -> None:
        """The disk is gone."""
        for file in self.database.parent.glob(f"{self.database.name}*"):
            file.unlink()

    def run(self, module: str, *words: str) -> None:
        """Another of the service's modules to its end, with the same settings."""
        command = [sys.executable, "-m", f"services.auth.{module}", *words]
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
