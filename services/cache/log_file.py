"""One log or snapshot on the disk: whole records appended, a failed write taken back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from services.cache import record_file, records
from services.cache.records import Record

_CHUNK = 256


class LogFile:
    """A new file, its owner's alone (0600)."""

    def __init__(self, path: Path) -> None:
        self._marker = record_file.new_marker()
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self.num_bytes = 0
        self.is_dirty = False
        try:
            self._write(record_file.header(self._marker))
        except OSError:
            os.close(self._fd)
            raise

    def append(self, new: Iterable[Record]) -> None:
        """Writes records in one go.

        Raises:
            OSError: none of them is in the file.
        """
        frames = []
        for record in new:
            frame = record_file.frame(self._marker, records.encode(record))
            frames += [frame] * (2 if isinstance(record, records.CRITICAL) else 1)
        self._write(b"".join(frames))

    def sync(self) -> None:
        """Returns when all of it is on the disk."""
        if self.is_dirty:
            os.fsync(self._fd)
            self.is_dirty = False

    def close(self) -> None:
        """Without a sync."""
        os.close(self._fd)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            with contextlib.suppress(OSError):  # a reader cuts back what is left of it
                os.ftruncate(self._fd, self.num_bytes)
                os.lseek(self._fd, self.num_bytes, os.SEEK_SET)
            raise
        self.num_bytes += len(data)
        self.is_dirty = True


def write_snapshot(path: Path, state: Iterable[Record]) -> int:
    """All of `state` or, after a crash, nothing of it; returns the file's size.

    Raises:
        OSError: it is not written.
    """
    draft = path.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    file = LogFile(draft)
    try:
        rest = iter(state)
        while chunk := list(islice(rest, _CHUNK)):
            file.append(chunk)
        file.sync()
        draft.replace(path)
        _sync_folder(path.parent)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    finally:
        file.close()
    return file.num_bytes


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
