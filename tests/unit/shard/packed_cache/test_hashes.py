"""A hash is remembered while its file is as it was, and no longer."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from services.shard.fingerprint import WeightHashes
from services.shard.packed_cache.hashes import RememberedHashes

LATER_NS = 10_000_000_000


class Computed:
    """Hashes files, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, file: Path) -> str:
        self.count += 1
        return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    return path


def remembered(tmp_path: Path, after_ns: int = LATER_NS) -> RememberedHashes:
    """As a process that starts so long after the files were written."""
    return RememberedHashes(tmp_path / "cache", lambda: time.time_ns() + after_ns)


def test_a_file_is_hashed_once_when_it_stays_as_it_is(tmp_path: Path, file: Path) -> None:
    compute = Computed()
    hashes = {remembered(tmp_path).sha256(file, compute) for _ in range(3)}
    assert hashes == {hashlib.sha256(b"one").hexdigest()}
    assert compute.count == 1


def test_a_file_is_hashed_again_when_it_was_written_with_size_and_time_as_before(
    tmp_path: Path, file: Path
) -> None:
    compute = Computed()
    before = file.stat()
    remembered(tmp_path).sha256(file, compute)
    file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    got = remembered(tmp_path).sha256(file, compute)
    assert got == hashlib.sha256(b"two").hexdigest()
    assert compute.count == 2


def test_nothing_is_remembered_when_the_file_was_written_just_now(
    tmp_path: Path, file: Path
) -> None:
    compute = Computed()
    for _ in range(2):
        remembered(tmp_path, after_ns=0).sha256(file, compute)
    assert compute.count == 2


def test_nothing_is_remembered_when_the_file_changes_while_it_is_hashed(
    tmp_path: Path, file: Path
) -> None:
    def compute(path: Path) -> str:
        path.write_bytes(b"two")
        return hashlib.sha256(b"one").hexdigest()

    remembered(tmp_path).sha256(file, compute)
    got = remembered(tmp_path).sha256(file, Computed())
    assert got == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"x": 1}', b"\xff\xfe"])
def test_files_are_hashed_again_when_what_was_remembered_is_torn(
    tmp_path: Path, file: Path, content: bytes
) -> None:
    compute = Computed()
    remembered(tmp_path).sha256(file, compute)
    (tmp_path / "cache" / "hashes.json").write_bytes(content)
    for _ in range(2):
        remembered(tmp_path).sha256(file, compute)
    assert compute.count == 2


def test_a_file_is_hashed_when_nothing_can_be_remembered(tmp_path: Path, file: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file where the folder would be")
    assert remembered(tmp_path).sha256(file, Computed()) == hashlib.sha256(b"one").hexdigest()


def test_weights_are_not_current_when_a_file_was_replaced_since_it_was_hashed(file: Path) -> None:
    hashes = WeightHashes([file])
    hashes.wait()
    assert hashes.are_current()
    other = file.with_name("other")
    other.write_bytes(b"two")
    other.replace(file)
    assert not hashes.are_current()
    file.unlink()
    assert not hashes.are_current()
