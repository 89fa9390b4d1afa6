"""The log of a data folder, written by a thread of its own; nothing here waits for a disk.

A record is with the operating system within milliseconds, so that the death of the process loses
nothing that `written` has returned for; it is on the disk after `fsync_interval_s`, at once after
`synced`. Where writing fails the cache goes on in memory, and the next snapshot tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from infermesh.config import ConfigError
from infermesh.telemetry import logs, metrics
from services.cache import recovery
from services.cache.log_file import LogFile, write_snapshot
from services.cache.records import Record

_MAX_QUEUED = 16_384
_MAX_WRITE = 256

_log = logs.get(__name__)
_durable = metrics.gauge("cache_durable", "1 while entries are written to disk, else 0.")
_log_bytes = metrics.gauge("cache_log_bytes", "Bytes of the log since its last snapshot.")
_write_failures = metrics.counter("cache_write_failures_total", "Writes that the disk refused.")


@dataclass(frozen=True, slots=True)
class _Barrier:
    """Resolved once everything before it is written, and synced where asked."""

    done: Callable[[bool], None]
    fsync: bool


@dataclass(frozen=True, slots=True)
class _Snapshot:
    records: Iterable[Record]


class Journal:
    """Appends in order. Call `start` once; `append` and `snapshot` from one thread."""

    def __init__(self, folder: Path, fsync_interval_s: float) -> None:
        self._folder = folder
        self._generation = 0
        self._fsync_interval_s = fsync_interval_s
        self._queue: queue.Queue[Record | _Barrier | _Snapshot | None] = queue.Queue(_MAX_QUEUED)
        self._file: LogFile | None = None
        self._synced_s = time.monotonic()
        self._lock = _take_lock(folder)
        self.is_durable = True
        self.num_snapshot_bytes = 0
        self._thread = threading.Thread(target=self._run, name="cache-journal", daemon=True)

    @property
    def num_bytes(self) -> int:
        """Of the open log."""
        return self._file.num_bytes if self._file is not None else 0

    def start(self, generation: int) -> None:
        """Opens the log after that generation; older ones are left as they are."""
        self._generation = generation
        try:
            self._open_next()
        except OSError as error:
            self._fail(error)
        self._thread.start()

    def append(self, *new: Record) -> None:
        """Writes records soon; where the disk is too slow for that, the next snapshot has them."""
        try:
            for record in new:
                self._queue.put_nowait(record)
        except queue.Full:
            self._fail(OSError(0, "the disk is slower than the cache"))

    def snapshot(self, state: Iterable[Record]) -> bool:
        """Replaces all files by the state as it is now. The records are taken in the thread."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(_Snapshot(state))
            return True
        return False

    async def written(self) -> bool:
        """Waits until all before is with the operating system; False where it can't be."""
        return await self._barrier(fsync=False)

    async def synced(self) -> bool:
        """Waits until all before is on the disk; False where it can't be."""
        return await self._barrier(fsync=True)

    def stop(self, timeout_s: float) -> bool:
        """Writes and syncs what is queued; blocks. False where that took too long."""
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            return False
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        os.close(self._lock)
        return True

    async def _barrier(self, *, fsync: bool) -> bool:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()

        def resolve(ok: bool) -> None:
            if not future.done():
                future.set_result(ok)

        def done(ok: bool) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(resolve, ok)

        try:
            self._queue.put_nowait(_Barrier(done, fsync))
        except queue.Full:
            return False
        return await future

    def _run(self) -> None:
        while True:
            batch = self._take()
            try:
                if not self._handle(batch):
                    break
            except Exception:  # a defect: the cache goes on in memory
                _log.exception("the cache's journal failed")
                self._fail(OSError(0, "a defect of the journal"))
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.sync()
            self._file.close()

    def _take(self) -> list[Record | _Barrier | _Snapshot | None]:
        """What is queued; empty where it is time to sync instead."""
        is_dirty = self._file is not None and self._file.is_dirty
        left_s = self._synced_s + self._fsync_interval_s - time.monotonic()
        try:
            batch = [self._queue.get(timeout=max(0.0, left_s) if is_dirty else None)]
        except queue.Empty:
            return []
        with contextlib.suppress(queue.Empty):
            while len(batch) < _MAX_WRITE:
                batch.append(self._queue.get_nowait())
        return batch

    def _handle(self, batch: list[Record | _Barrier | _Snapshot | None]) -> bool:
        """Writes runs of records together; False where the journal is to stop."""
        run: list[Record] = []
        for item in batch:
            if item is None or isinstance(item, _Barrier | _Snapshot):
                self._write(run)
                run = []
            if item is None:
                return False
            if isinstance(item, _Barrier):
                if item.fsync:
                    self._sync()
                item.done(self.is_durable)
            elif isinstance(item, _Snapshot):
                self._replace(item.records)
            else:
                run.append(item)
        self._write(run)
        if time.monotonic() - self._synced_s >= self._fsync_interval_s:
            self._sync()
        return True

    def _write(self, run: list[Record]) -> None:
        if self._file is None or not run:
            return
        try:
            self._file.append(run)
        except OSError as error:
            self._fail(error)
        _log_bytes.set(self.num_bytes)

    def _sync(self) -> None:
        self._synced_s = time.monotonic()
        if self._file is None:
            return
        try:
            self._file.sync()
        except OSError as error:
            self._fail(error)

    def _open_next(self) -> None:
        self._generation += 1
        self._file = LogFile(recovery.log_path(self._folder, self._generation))
        _durable.set(1)

    def _replace(self, state: Iterable[Record]) -> None:
        """New log first: a crash between the two leaves the old snapshot and both logs."""
        was_durable = self.is_durable
        try:
            self._sync()
            if self._file is not None:
                self._file.close()
            self._open_next()
            path = recovery.snapshot_path(self._folder, self._generation)
            self.num_snapshot_bytes = write_snapshot(path, state)
            recovery.remove_older(self._folder, self._generation)
        except OSError as error:
            self._fail(error)
            return
        self.is_durable = True
        if not was_durable:
            _log.warning("the cache is written to disk again")

    def _fail(self, error: OSError) -> None:
        """From the journal's thread, or from `append` where its queue is full."""
        _write_failures.inc()
        _durable.set(0)
        if self.is_durable:
            _log.error(
                "the cache can't be written to %s: %s; it goes on in memory",
                self._folder,
                error.strerror or error,
            )
        self.is_durable = False
        if threading.current_thread() is self._thread and self._file is not None:
            self._file.close()
            self._file = None


def _take_lock(folder: Path) -> int:
    """The folder is this process's alone.

    Raises:
        ConfigError: another process has it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"cache.data_dir {folder} can't be used: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ConfigError(f"cache.data_dir {folder} is in use by another cache") from None
    return lock
