"""What a backup is: gzip of JSON lines, the same for every kind of database.

    {"format": "infermesh-auth", "version": 1, "schema": "0003", "made_unix_s": ...}
    ["tenants", {"id": "acme", ...}]          a row; tables in an order in which keys refer back
    {"rows": {"tenants": 1, ...}, "sha256": "..."}      of all bytes before this line

Owns reading and writing; whose rows they are is `backup.py`'s and `restore.py`'s.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from infermesh.config import ConfigError

FORMAT = "infermesh-auth"
VERSION = 1
_BYTES = "base64"
# A row is some 10 KiB at most: its labels.
_MAX_LINE = 1 << 20


def to_json(value: object) -> object:
    """A column's value; bytes are marked."""
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    return value


def from_json(value: object) -> object:
    """The reverse."""
    if isinstance(value, dict) and value.keys() == {_BYTES}:
        return base64.b64decode(value[_BYTES])
    return value


class Writer:
    """A file that appears at `path` when it is whole, readable by its owner alone.

    Raises:
        ConfigError: it can't be written; what was at `path` is still there. No OSError: beside a
            database, that would be the database's.
    """

    def __init__(self, path: Path, schema: str) -> None:
        self._path = path
        self._draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
        self._digest = hashlib.sha256()
        self._counts: Counter[str] = Counter()
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC
        with self._failures():
            self._raw = os.fdopen(os.open(self._draft, flags, 0o600), "wb")
        self._gzip = gzip.GzipFile(fileobj=self._raw, mode="wb", compresslevel=6, mtime=0)
        header = {"format": FORMAT, "version": VERSION, "schema": schema}
        self._line({**header, "made_unix_s": int(time.time())})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # a full disk has said so before
            self._raw.close()
        self._draft.unlink(missing_ok=True)  # gone already where it was finished

    def rows(self, table: str, rows: Iterable[dict[str, Any]]) -> None:
        """Adds rows of one table."""
        with self._failures():
            for row in rows:
                self._line([table, row])
                self._counts[table] += 1

    def finish(self) -> Counter[str]:
        """Puts the file in its place; how many rows it has of each table."""
        with self._failures():
            self._line({"rows": dict(self._counts), "sha256": self._digest.hexdigest()})
            self._gzip.close()
            self._raw.flush()
            os.fsync(self._raw.fileno())
            self._draft.replace(self._path)
        return self._counts

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"{self._path} can't be written: {error.strerror}") from None

    def _line(self, facts: object) -> None:
        line = json.dumps(facts, separators=(",", ":")).encode() + b"\n"
        self._digest.update(line)
        self._gzip.write(line)


def check(path: Path, known_schemas: Iterable[str]) -> None:
    """Reads all of a file before any of it is used.

    Raises:
        ConfigError: it is no backup, of a later version, or not as it was written.
        OSError: it can't be read.
    """
    digest, counts, last = hashlib.sha256(), Counter[str](), b""
    header: dict[str, Any] = {}
    for number, line in enumerate(_lines(path)):
        if number == 0:
            header = _header(path, line)
        else:
            digest.update(last)
            if number > 1:
                counts[_row(path, last)[0]] += 1
        last = line
    if header["schema"] not in set(known_schemas):
        raise ConfigError(
            f"{path} has schema {header['schema']}, which a later version of infermesh wrote"
        )
    trailer = _parsed(last)
    if not isinstance(trailer, dict) or "sha256" not in trailer:
        raise ConfigError(f"{path} is torn: its end is missing")
    if trailer["sha256"] != digest.hexdigest() or trailer.get("rows") != dict(counts):
        raise ConfigError(f"{path} was altered: its checksum is another")


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file that was checked, in their order."""
    last = b""
    for number, line in enumerate(_lines(path)):
        if number > 1:
            yield _row(path, last)
        last = line


def _header(path: Path, line: bytes) -> dict[str, Any]:
    header = _parsed(line)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ConfigError(f"{path} is no backup of an auth database")
    if header.get("version") != VERSION:
        raise ConfigError(
            f"{path} has format version {header.get('version')}; this infermesh reads {VERSION}"
        )
    return header


def _row(path: Path, line: bytes) -> tuple[str, dict[str, Any]]:
    found = _parsed(line)
    if not isinstance(found, list) or len(found) != 2:
        raise ConfigError(f"{path} was altered: a line of it is no row")
    return found[0], found[1]


def _parsed(line: bytes) -> object:
    try:
        found: object = json.loads(line)
    except ValueError:
        return None
    return found


def _lines(path: Path) -> Iterator[bytes]:
    """Raises ConfigError where the compressed bytes are not whole."""
    is_empty = True
    try:
        with gzip.open(path, "rb") as file:
            while line := file.readline(_MAX_LINE):
                is_empty = False
                yield line
    except EOFError:
        raise ConfigError(f"{path} is torn: its end is missing") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        is_other = is_empty and isinstance(error, gzip.BadGzipFile)
        what = "is no backup of an auth database" if is_other else "was altered"
        raise ConfigError(f"{path} {what}: {error}") from None
    if is_empty:
        raise ConfigError(f"{path} is no backup of an auth database: it is empty")
