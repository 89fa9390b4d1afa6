"""SHA-256 of weight files that were hashed before, so that nobody has to read them again for it.

A hash is remembered with what the file system says of the file: device, inode, size, and the times
of its last write and change, of which the second can't be set back. No torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from infermesh.telemetry import logs

_FILE_NAME = "hashes.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST = 512
# A file that changed this shortly before may change again within the same tick of its clock.
_SETTLED_NS = 2_000_000_000
Identity = tuple[int, int, int, int, int]
_log = logs.get(__name__)


def identity(file: Path) -> Identity:
    """Changes whenever the file does. Raises OSError."""
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


class RememberedHashes:
    """One small file for all processes; what one of them forgets for another is hashed again."""

    def __init__(self, folder: Path, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._path = folder / _FILE_NAME
        self._now_ns = now_ns

    def sha256(self, file: Path, compute: Callable[[Path], str]) -> str:
        """What `compute` gives, or gave when the file was just as it is now.

        Raises OSError where the file can't be read.
        """
        name, before = str(file.resolve()), identity(file)
        known = self._load()
        if name in known and known[name]["identity"] == list(before):
            return str(known[name]["sha256"])
        settled = self._now_ns() - file.stat().st_ctime_ns > _SETTLED_NS
        digest = compute(file)
        if settled:  # one that changed meanwhile is another by now
            self._save(name, {"identity": before, "sha256": digest})
        return digest

    def _load(self) -> dict[str, dict[str, object]]:
        try:
            known = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        entries = known.items() if isinstance(known, dict) else ()
        return {name: one for name, one in entries if _is_whole(one)}

    def _save(self, name: str, entry: dict[str, object]) -> None:
        known = self._load()
        known.pop(name, None)
        newest = {**dict(list(known.items())[-(_MOST - 1) :]), name: entry}
        scratch = self._path.with_name(f"{_FILE_NAME}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            scratch.write_text(json.dumps(newest))
            scratch.replace(self._path)
        except OSError as exc:
            _log.info("a hash is not remembered", extra={"reason": str(exc)})
            with contextlib.suppress(OSError):
                scratch.unlink()


def _is_whole(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("identity"), list)
        and _SHA256.fullmatch(str(entry.get("sha256"))) is not None
    )
