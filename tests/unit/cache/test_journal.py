"""The log on a real disk: what is written comes back, and a disk that fails stops nothing."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infermesh.config import ConfigError
from services.cache import log_file, records, recovery
from services.cache.journal import Journal
from tests.unit.cache.entries import entry


def kept(number: int) -> records.Kept:
    return records.of_entry(entry(number))


def state(*numbers: int) -> list[records.Record]:
    return [kept(number) for number in numbers]


@asynccontextmanager
async def journal_in(folder: Path) -> AsyncIterator[Journal]:
    journal = Journal(folder, fsync_interval_s=0.0)
    journal.start(recovery.recover(folder).generation)
    try:
        yield journal
    finally:
        assert journal.stop(10.0)


def ids(folder: Path) -> list[int]:
    return sorted(recovery.recover(folder).kept)


async def test_journal_gives_back_entries_when_opened_again(tmp_path: Path) -> None:
    async with journal_in(tmp_path) as journal:
        journal.append(kept(1), kept(2))
        assert await journal.written()
        assert ids(tmp_path) == [1, 2]  # before it is closed: as after kill -9
    async with journal_in(tmp_path) as journal:
        journal.append(kept(3), records.Removed([1]))
    recovered = recovery.recover(tmp_path)
    assert sorted(recovered.kept) == [2, 3]
    assert records.to_entry(recovered.kept[entry(2).id]) == entry(2)


async def test_snapshot_replaces_all_files_before_it(tmp_path: Path) -> None:
    async with journal_in(tmp_path) as journal:
        journal.append(kept(1), kept(2))
        assert journal.snapshot(state(2))
        journal.append(kept(3))
        assert await journal.synced()
    names = sorted(os.listdir(tmp_path))
    assert names == ["000002.log", "000002.snapshot", "lock"]
    assert ids(tmp_path) == [2, 3]


async def test_recover_reads_the_old_files_when_a_snapshot_was_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(path: Path, _: Any) -> int:
        path.with_suffix(".draft").write_bytes(b"half")
        raise OSError(errno.EIO, "crash")

    async with journal_in(tmp_path) as journal:
        journal.append(kept(1))
        monkeypatch.setattr("services.cache.journal.write_snapshot", crash)
        journal.snapshot(state(1))
        await journal.synced()
    assert ids(tmp_path) == [1]


async def test_epoch_voids_what_was_written_before(tmp_path: Path) -> None:
    async with journal_in(tmp_path) as journal:
        journal.append(kept(1), records.Epoch(1), kept(2))
    recovered = recovery.recover(tmp_path)
    assert (sorted(recovered.kept), recovered.epoch) == ([2], 1)


@pytest.mark.parametrize(
    "last_word",
    [
        records.Removed([1]),
        records.Epoch(1),
        records.Quarantined(1, b"k" * 32, "acme", "print", 9e9),
    ],
)
def test_a_flipped_bit_brings_nothing_back_when_it_was_taken_out(
    tmp_path: Path, last_word: records.Record
) -> None:
    path = recovery.log_path(tmp_path, 1)
    file = log_file.LogFile(path)
    file.append([kept(1)])
    start = file.num_bytes
    file.append([last_word])
    file.close()
    whole = path.read_bytes()
    for at in range(8 * start, 8 * len(whole)):
        spoilt = bytearray(whole)
        spoilt[at // 8] ^= 1 << at % 8
        path.write_bytes(spoilt)
        recovered = recovery.recover(tmp_path)
        assert recovered.num_corrupt == 1
        assert recovered.quarantined or not recovered.kept


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.data())
def test_recover_gives_no_wrong_answer_when_the_log_is_damaged(
    tmp_path: Path, damage: st.DataObject
) -> None:
    path = recovery.log_path(tmp_path, 1)
    path.unlink(missing_ok=True)
    file = log_file.LogFile(path)
    file.append(state(*range(1, 9)))
    file.close()
    data = bytearray(path.read_bytes())
    for _ in range(damage.draw(st.integers(0, 4))):
        data[damage.draw(st.integers(0, len(data) - 1))] ^= damage.draw(st.integers(1, 255))
    path.write_bytes(data[: damage.draw(st.integers(0, len(data)))])
    for entry_id, record in recovery.recover(tmp_path).kept.items():
        assert records.to_entry(record) == entry(entry_id)


def test_recover_says_so_once_when_the_tail_is_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = recovery.log_path(tmp_path, 1)
    file = log_file.LogFile(path)
    file.append(state(1, 2))
    file.close()
    os.truncate(path, path.stat().st_size - 3)
    with caplog.at_level(logging.WARNING):
        assert ids(tmp_path) == [1]
        assert ids(tmp_path) == [1]
    assert [one.message for one in caplog.records] == [
        "000001.log ended within a record; cut back to the last whole one"
    ]


def test_recover_sets_a_file_aside_when_its_header_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recovery.log_path(tmp_path, 1).write_bytes(b"\0" * 200)
    recovered = recovery.recover(tmp_path)
    assert recovered.num_corrupt == 1
    assert (tmp_path / "000001.log.damaged").exists()
    assert "000001.log can't be read" in caplog.text


class Disk:
    """Stands in for os.write; may be full after so many bytes."""

    def __init__(self) -> None:
        self.room: int | None = None
        self._write = os.write

    def write(self, fd: int, data: Any) -> int:
        if self.room is None:
            return self._write(fd, data)
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(fd, bytes(data)[: self.room])
        self.room -= written
        return written


async def test_journal_goes_on_when_the_disk_is_full_and_writes_again_when_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk()
    monkeypatch.setattr(log_file.os, "write", disk.write)
    async with journal_in(tmp_path) as journal:
        journal.append(kept(1))
        assert await journal.written()
        disk.room = 40  # within the next record
        journal.append(kept(2))
        assert not await journal.written()
        journal.append(kept(3))
        assert not await journal.synced()
        assert not journal.is_durable
        assert caplog.text.count("can't be written") == 1
        assert "No space left on device" in caplog.text
        assert ids(tmp_path) == [1]
        disk.room = None
        journal.snapshot(state(1, 2, 3))
        journal.append(kept(4))
        assert await journal.synced()
        assert journal.is_durable
    assert ids(tmp_path) == [1, 2, 3, 4]


async def test_journal_refuses_a_folder_when_another_cache_has_it(tmp_path: Path) -> None:
    async with journal_in(tmp_path):
        with pytest.raises(ConfigError, match="in use by another cache"):
            Journal(tmp_path, 1.0)


async def test_files_are_their_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    async with journal_in(folder) as journal:
        journal.append(kept(1))
        journal.snapshot(state(1))
        await journal.synced()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
