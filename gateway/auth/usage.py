"""Usage records on their way to the ledger: spooled to disk before a client has its answer's end,
deleted when the ledger has them. A record is never lost or counted twice, whoever is killed when.

A segment is a file of lines `crc32 json`, held by a lock while it is written. A sealed one, or one
whose writer has died, is sent by whoever gets its lock.
"""

import contextlib
import fcntl
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import orjson

from infermesh.config import ConfigError
from infermesh.telemetry import logs

_log = logs.get(__name__)
_SUFFIX = ".usage"
_BAD = ".damaged"
_REFUSED = ".refused"
_SHORTENED = ".shortened"
MAX_UNWRITTEN = 10_000


class UsageRow(TypedDict):
    """One request's cost, as the ledger takes it."""

    record_id: str
    request_id: str
    tenant_id: str
    key_id: str
    model: str
    endpoint: str
    status: str
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    finished_unix_ms: int


class Spool:
    """The segments in one folder, which several gateways may share.

    Raises:
        ConfigError: the folder can't be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: int | None = None
        self._count = 0
        self._unwritten: list[UsageRow] = []
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._open()
        except OSError as error:
            raise ConfigError(
                f"gateway.usage_dir is {folder}, which can't be written: {error.strerror}"
            ) from None

    def append(self, row: UsageRow) -> None:
        """Hands a record to the operating system; microseconds, so it is done in the event loop."""
        if len(self._unwritten) >= MAX_UNWRITTEN:
            _log.error("usage lost", extra={"request_id": self._unwritten.pop(0)["request_id"]})
        self._unwritten.append(row)
        self._write()

    def seal(self) -> None:
        """What was appended so far can be sent; later records go to a new segment."""
        self._write()
        if self._file is None or not os.fstat(self._file).st_size:
            return
        self.close()
        try:
            self._open()
        except OSError as error:
            _log.error("usage spool failed", extra={"error": str(error)})

    def close(self) -> None:
        """Gives the current segment to whoever finds it."""
        if self._file is not None:
            os.close(self._file)  # and with it the lock
            self._file = None

    def segments(self) -> Iterator["Segment"]:
        """Segments that nobody else writes or sends, oldest first; each is ours until released."""
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            if path.name.startswith("."):
                continue  # another gateway is about to lock it
            segment = Segment.take(path)
            if segment is not None:
                yield segment

    def backlog(self) -> tuple[int, float]:
        """Bytes that wait for the ledger, and the age in seconds of the oldest of them.

        A segment's age is in its name: when it was begun.
        """
        num_bytes, oldest_s = 0, 0.0
        for path in self._folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # it was sent meanwhile
                size = path.stat().st_size
                begun_ns = path.name.lstrip(".").partition("-")[0]
                if size and begun_ns.isdigit():
                    num_bytes += size
                    oldest_s = max(oldest_s, (time.time_ns() - int(begun_ns)) / 1e9)
        return num_bytes, oldest_s

    def _open(self) -> None:
        self._count += 1
        name = f"{time.time_ns():020}-{os.getpid()}-{self._count}{_SUFFIX}"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        # locked before it has its name: nobody may take it for a dead writer's
        draft = self._folder / f".{name}"
        file = os.open(draft, flags, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            draft.rename(self._folder / name)
        except OSError:
            os.close(file)
            raise
        self._file = file

    def _write(self) -> None:
        """Whole lines or nothing: after a full disk, what was half written is cut off."""
        while self._unwritten:
            line = _line(self._unwritten[0])
            try:
                if self._file is None:
                    self._open()
                assert self._file is not None
                size = os.fstat(self._file).st_size
                if os.write(self._file, line) != len(line):
                    os.ftruncate(self._file, size)
                    raise OSError("short write")
            except OSError as error:
                _log.error("usage spool failed", extra={"error": str(error)})
                return
            self._unwritten.pop(0)


class Segment:
    """A file whose lock is held."""

    def __init__(self, path: Path, file: int) -> None:
        self._path = path
        self._file = file

    @classmethod
    def take(cls, path: Path) -> "Segment | None":
        """None where another holds it, or has just sent it."""
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        if not _is_at(path, file):  # it was sent and deleted, or shortened, between the two
            os.close(file)
            return None
        return cls(path, file)

    def rows(self) -> list[UsageRow]:
        """The records in it; damaged lines are left out, and the file is kept aside for them."""
        rows, damaged = [], False
        for line in self._path.read_bytes().splitlines():
            checksum, _, body = line.partition(b" ")
            if checksum != b"%08x" % zlib.crc32(body):
                damaged = True
                continue
            try:
                rows.append(orjson.loads(body))
            except orjson.JSONDecodeError:
                damaged = True
        if damaged:
            _log.error("usage spool is damaged", extra={"file": str(self._path)})
            self._path.with_name(f"{self._path.name}{_BAD}").write_bytes(self._path.read_bytes())
        return rows

    def quarantine(self, rows: list[UsageRow]) -> None:
        """The ledger will never take them; on the disk before they leave the segment.

        For a person to look at: renamed without its last suffix, the file is sent again.
        """
        path = self._path.with_name(f"{self._path.name}{_REFUSED}")
        _write_all(path, os.O_APPEND, rows)

    def keep(self, rows: list[UsageRow]) -> None:
        """What is left to send, in place of what there was; all of it or, killed, none."""
        draft = self._path.with_name(f".{self._path.name}{_SHORTENED}")
        _write_all(draft, os.O_TRUNC, rows)
        draft.replace(self._path)

    def delete(self) -> None:
        """The ledger has it."""
        self._path.unlink(missing_ok=True)

    def release(self) -> None:
        """Somebody else may take it."""
        os.close(self._file)


def _line(row: UsageRow) -> bytes:
    body = orjson.dumps(row)
    return b"%08x %b\n" % (zlib.crc32(body), body)


def _write_all(path: Path, how: int, rows: list[UsageRow]) -> None:
    """Returns when they are on the disk."""
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | how, 0o600)
    try:
        rest = memoryview(b"".join(map(_line, rows)))
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    finally:
        os.close(file)


def _is_at(path: Path, file: int) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(file))
