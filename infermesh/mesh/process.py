"""One supervised process: started, watched, restarted with backoff, replaced, stopped."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infermesh.errors import Internal
from infermesh.mesh.models import ROOT
from infermesh.mesh.plan import ProcessSpec

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0
HEALTHY_AFTER_S = 10.0


class ManagedProcess:
    """Keeps one process running from `start` until `stop`.

    Args:
        spec: what to run.
        on_restart: called after each restart announced itself.
    """

    def __init__(self, spec: ProcessSpec, on_restart: Callable[[], None]) -> None:
        self.spec = spec
        self._arguments = list(spec.arguments)
        self._on_restart = on_restart
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        # Set each time a new process has said where it serves.
        self._renewed = asyncio.Event()
        self.facts: dict[str, Any] = {}
        # Sockets that its settings name as fd://N.
        self.inherited: tuple[int, ...] = ()

    async def start(self) -> None:
        """Starts the process; its output goes to the log file."""
        self.spec.announce_file.unlink(missing_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("INFERMESH_")}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        )
        environment.update(self.spec.environment)
        environment.setdefault("TOKENIZERS_PARALLELISM", "false")
        with self.spec.log_file.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self.spec.module,
                *self._arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=self.inherited,
                # Ctrl-C is the supervisor's alone, which then stops them in order
                start_new_session=True,
            )

    @property
    def serving_pid(self) -> int | None:
        """Of the process that runs and has said where it serves."""
        process = self._process
        if self._stopping or process is None or process.returncode is not None:
            return None
        return process.pid if self.facts.get("pid") == process.pid else None

    def crash(self) -> None:
        """SIGKILL; `keep_running` starts another."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def wait_announced(self) -> dict[str, Any]:
        """What the process said once it served.

        Raises:
            Internal: it ended before that; the message is its own last sentence.
        """
        while True:
            if self.spec.announce_file.exists():
                self.facts = json.loads(self.spec.announce_file.read_text())
                return self.facts
            if self._process is None or self._process.returncode is not None:
                raise Internal(self.last_words())
            await asyncio.sleep(0.02)

    async def keep_running(self) -> None:
        """Restarts the process whenever it ends, until `stop`."""
        backoff_s = FIRST_BACKOFF_S
        loop = asyncio.get_running_loop()
        while not self._stopping:
            assert self._process is not None
            since = loop.time()
            process = self._process
            await process.wait()
            if self._stopping:
                return
            if process is not self._process:  # another has its place
                continue
            if loop.time() - since > HEALTHY_AFTER_S:
                backoff_s = FIRST_BACKOFF_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)
            if self._stopping:
                return
            await self.start()
            with contextlib.suppress(Internal):  # it died again: the loop goes on
                await self.wait_announced()
                self._renewed.set()
                self._on_restart()

    async def end(self, grace_s: float) -> None:
        """Has it drain and end; `keep_running` starts another."""
        self._renewed.clear()
        if self._process is not None:
            await _end(self._process, grace_s)

    async def renewed(self) -> None:
        """Returns once another process serves in its place."""
        await self._renewed.wait()

    async def replace(self, grace_s: float) -> None:
        """Has it drain and end once its successor serves.

        Raises:
            Internal: the successor did not come up; the old one goes on.
        """
        old = self._process
        await self.start()
        new = self._process
        try:
            await self.wait_announced()
        except BaseException:
            self._process = old
            if new is not None and new.returncode is None:
                new.kill()
            raise
        self._on_restart()
        if old is not None:
            await _end(old, grace_s)

    def pin(self, flag: str, value: str) -> None:
        """Restarts use this value: a port that was chosen once stays."""
        self._arguments = [a for a in self._arguments if not a.startswith(f"--{flag}=")]
        self._arguments.append(f"--{flag}={value}")

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL once the grace is over."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        await _end(process, grace_s)

    def kill(self) -> None:
        """SIGKILL at once."""
        self._stopping = True
        self.crash()

    async def wait(self) -> None:
        """Returns when the process has ended."""
        if self._process is not None:
            await self._process.wait()

    def last_words(self) -> str:
        """The last `error:` line of its log, or where the log is."""
        return last_error(self.spec.log_file) or (
            f"{self.spec.name} ended unexpectedly; its log is {self.spec.log_file}"
        )


async def _end(process: asyncio.subprocess.Process, grace_s: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(grace_s):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def last_error(log_file: Path) -> str | None:
    """The sentence behind the last `error: ` of a log."""
    try:
        lines = log_file.read_text(errors="replace").splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith("error: ")]
    return found[-1].removeprefix("error: ") if found else None
