"""From the files of a data folder back to what the cache held. Blocking; runs off the loop.

    000007.snapshot   everything up to the start of 000007.log
    000007.log        what came after, 000008.log what came after that

The newest snapshot and the logs from its number on are read, in order.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from infermesh.telemetry import logs
from services.cache import record_file, records
from services.cache.domain import EntryId

_log = logs.get(__name__)


@dataclass(slots=True)
class Recovered:
    """What the files say."""

    kept: dict[EntryId, records.Kept] = field(default_factory=dict)
    vectors: dict[EntryId, records.Embedded] = field(default_factory=dict)
    quarantined: list[records.Quarantined] = field(default_factory=list)
    epoch: int = 0
    # Of the newest file.
    generation: int = 0
    num_bytes: int = 0
    num_corrupt: int = 0

    def apply(self, record: records.Record) -> None:
        """Replays one record."""
        if isinstance(record, records.Kept):
            self.kept[EntryId(record.id)] = record
        elif isinstance(record, records.Embedded):
            self.vectors[EntryId(record.id)] = record
        elif isinstance(record, records.Removed):
            for one in record.ids:
                self.kept.pop(EntryId(one), None)
                self.vectors.pop(EntryId(one), None)
        elif isinstance(record, records.Quarantined):
            self.quarantined.append(record)
        elif record.epoch != self.epoch:  # the second copy of one is the same epoch
            self.kept.clear()
            self.vectors.clear()
            self.epoch = record.epoch


def snapshot_path(folder: Path, generation: int) -> Path:
    """Where a generation's snapshot is."""
    return folder / f"{generation:06d}.snapshot"


def log_path(folder: Path, generation: int) -> Path:
    """Where a generation's log is."""
    return folder / f"{generation:06d}.log"


def generations(folder: Path, suffix: str) -> list[int]:
    """Which there are of a kind, oldest first."""
    return sorted(int(path.stem) for path in folder.glob(f"*{suffix}") if path.stem.isdigit())


def remove_older(folder: Path, generation: int) -> None:
    """Deletes what the snapshot of a generation replaces, and drafts left by a crash."""
    for suffix in (".snapshot", ".log"):
        for one in generations(folder, suffix):
            if one < generation:
                (folder / f"{one:06d}{suffix}").unlink(missing_ok=True)
    for draft in folder.glob("*.draft"):
        draft.unlink(missing_ok=True)


def recover(folder: Path) -> Recovered:
    """Reads a folder; damage is logged, counted and passed over.

    Raises:
        OSError: a file can't be read.
    """
    recovered = Recovered()
    snapshots = generations(folder, ".snapshot")
    newest = snapshots[-1] if snapshots else 0
    paths = [snapshot_path(folder, newest)] if snapshots else []
    paths += [log_path(folder, one) for one in generations(folder, ".log") if one >= newest]
    for path in paths:
        recovered.generation = max(recovered.generation, int(path.stem))
        for payload in _read(path, recovered):
            record = records.decode(payload)
            if record is None:
                recovered.num_corrupt += 1
            else:
                recovered.apply(record)
    if recovered.num_corrupt:
        _log.warning(
            "skipped damaged records of the cache", extra={"num_records": recovered.num_corrupt}
        )
    return recovered


def _read(path: Path, recovered: Recovered) -> Iterator[bytes]:
    data = path.read_bytes()
    recovered.num_bytes += len(data)
    damage = record_file.Damage()
    try:
        yield from record_file.scan(data, damage)
    except record_file.UnreadableFile as error:
        aside = path.with_name(path.name + ".damaged")
        path.replace(aside)
        recovered.num_corrupt += 1
        _log.error("%s can't be read: %s; it is kept as %s", path.name, error, aside.name)
        return
    recovered.num_corrupt += damage.num_corrupt
    if damage.is_truncated:
        with contextlib.suppress(OSError):  # a read-only folder still has its entries
            os.truncate(path, damage.end)
        _log.warning(
            "%s ended within a record; cut back to the last whole one",
            path.name,
            extra={"num_bytes_cut": len(data) - damage.end},
        )
