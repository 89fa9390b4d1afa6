"""The folder of packed models among processes that come and go: who writes an entry, how it gets
its name, and which entries make room for others. What is in a file is `entry.py`'s. No torch.

An entry has its name only when it is whole. While it is written it is KEY.partial, locked by who
writes it; one whose lock is free was left by a process that died.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

DEFAULT_FOLDER = "~/.cache/infermesh/packed"
_SUFFIX = ".safetensors"
_POLL_S = 0.05  # a lock that is waited for with a limit has to be polled


def folder_path(configured: str) -> Path | None:
    """Where packed models are kept; None where nobody's home is known."""
    try:
        return Path(configured or DEFAULT_FOLDER).expanduser()
    except RuntimeError:
        return None


class Folder:
    """Holds `budget_bytes` at most; what was used least lately goes first."""

    def __init__(self, path: Path, budget_bytes: int) -> None:
        self._path = path
        self._budget_bytes = budget_bytes

    def entry(self, key: str) -> Path:
        """Where an entry is, if it is."""
        return self._path / f"{key}{_SUFFIX}"

    def used(self, key: str) -> None:
        """An entry is wanted: others go before it."""
        with suppress(OSError):  # gone, or another user's: then it just is not younger
            os.utime(self.entry(key))

    @contextmanager
    def alone(
        self, key: str, patience_s: float, on_wait: Callable[[], None]
    ) -> Iterator[FileIO | None]:
        """Waits for others who write this entry, and yields a file to write it into; None where
        they take longer than `patience_s`.

        Raises OSError where the folder can't be written.
        """
        self._path.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = self._locked(self._partial(key), patience_s, on_wait)
        if file is None:
            yield None
            return
        try:
            file.truncate(0)
            yield file
        finally:
            # one that was published is elsewhere
            with suppress(OSError), file:
                if _is_at(file, self._partial(key)):
                    self._partial(key).unlink()

    def publish(self, key: str, file: FileIO) -> None:
        """Gives its name to a file from `alone` that is written whole. Raises OSError."""
        os.fchmod(file.fileno(), 0o400)
        self._partial(key).rename(self.entry(key))

    def make_room(self, num_bytes: int) -> bool:
        """Removes what was used least lately until so much more fits the budget, and what dead
        processes left; False where it never fits.

        Raises OSError.
        """
        for partial in self._path.glob("*.partial"):
            _remove_if_left(partial)
        if num_bytes > self._budget_bytes:
            return False
        entries = sorted((_last_use(path), path) for path in self._path.glob(f"*{_SUFFIX}"))
        total = sum(size for (_, size), _ in entries)
        for (_, size), path in entries:
            if total + num_bytes <= self._budget_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        return True

    def _partial(self, key: str) -> Path:
        return self._path / f"{key}.partial"

    def _locked(self, path: Path, patience_s: float, on_wait: Callable[[], None]) -> FileIO | None:
        deadline_s = time.monotonic() + patience_s
        while True:
            file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
            try:
                while not _lock(file):
                    if time.monotonic() > deadline_s:
                        file.close()
                        return None
                    on_wait()
                    time.sleep(_POLL_S)
                if _is_at(file, path):
                    return file
            except OSError:  # a file system without locks, say
                file.close()
                raise
            file.close()  # who had it has renamed or removed it


def _lock(file: FileIO) -> bool:
    """Whether it is ours now. A lock of a process that died is free."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_if_left(partial: Path) -> None:
    with suppress(FileNotFoundError), FileIO(partial, "r+b") as file:
        if _lock(file) and _is_at(file, partial):
            partial.unlink()


def _last_use(path: Path) -> tuple[int, int]:
    """Time in ns, and size; zeros where it is gone."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size
