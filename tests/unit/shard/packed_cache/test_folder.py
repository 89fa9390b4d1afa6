"""Who writes an entry, who waits, what a killed writer leaves, and what makes room."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from services.shard.packed_cache.folder import Folder, folder_path

KEY = "a" * 40
PATIENT_S = 60.0
# Holds the lock of an entry that is half written, until it is killed.
WRITER = """
import sys, time
from pathlib import Path
from services.shard.packed_cache.folder import Folder
with Folder(Path(sys.argv[1]), 1000).alone(sys.argv[2], 0, lambda: None) as file:
    file.write(b"half of i")
    print("writing", flush=True)
    sys.stdin.read()
"""


def keep(folder: Folder, key: str, content: bytes) -> None:
    with folder.alone(key, 0, lambda: None) as file:
        assert file is not None
        assert folder.make_room(len(content))
        file.write(content)
        folder.publish(key, file)


def names(path: Path) -> set[str]:
    return {one.name for one in path.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "packed", 100)


@pytest.fixture
def writer(tmp_path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "packed"), KEY]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_an_entry_has_its_name_when_it_is_whole(folder: Folder, tmp_path: Path) -> None:
    with folder.alone(KEY, 0, lambda: None) as file:
        assert file is not None
        file.write(b"content")
        assert not folder.entry(KEY).exists()
        folder.publish(KEY, file)
    assert folder.entry(KEY).read_bytes() == b"content"
    assert names(tmp_path / "packed") == {folder.entry(KEY).name}
    assert folder.entry(KEY).stat().st_mode & 0o777 == 0o400


def test_nothing_is_left_when_a_writer_gives_up(folder: Folder, tmp_path: Path) -> None:
    with folder.alone(KEY, 0, lambda: None) as file:
        assert file is not None
        file.write(b"half")
    assert not names(tmp_path / "packed")


def test_nothing_is_used_when_its_writer_was_killed(
    folder: Folder, writer: subprocess.Popen[str], tmp_path: Path
) -> None:
    with folder.alone(KEY, 0, lambda: None) as file:
        assert file is None
    end(writer)
    assert not folder.entry(KEY).exists()
    assert names(tmp_path / "packed") == {f"{KEY}.partial"}
    keep(folder, KEY, b"whole")
    assert folder.entry(KEY).read_bytes() == b"whole"


def test_others_wait_when_one_writes(folder: Folder) -> None:
    waits = threading.Event()
    found: list[bytes] = []

    def other() -> None:
        with folder.alone(KEY, PATIENT_S, waits.set):
            found.append(folder.entry(KEY).read_bytes())

    thread = threading.Thread(target=other)
    with folder.alone(KEY, 0, lambda: None) as file:
        thread.start()
        assert waits.wait(PATIENT_S)
        assert file is not None
        file.write(b"content")
        folder.publish(KEY, file)
    thread.join(PATIENT_S)
    assert found == [b"content"]


def test_what_a_killed_writer_left_makes_room_and_what_is_being_written_does_not(
    folder: Folder, writer: subprocess.Popen[str], tmp_path: Path
) -> None:
    partial = tmp_path / "packed" / f"{KEY}.partial"
    folder.make_room(1)
    assert partial.exists()
    end(writer)
    folder.make_room(1)
    assert not partial.exists()


def test_what_was_used_least_lately_makes_room(folder: Folder, tmp_path: Path) -> None:
    for age, key in enumerate("xyz"):
        keep(folder, key, bytes(30))
        os.utime(folder.entry(key), (1000 + age, 1000 + age))
    folder.used("x")
    keep(folder, "new", bytes(60))
    assert names(tmp_path / "packed") == {folder.entry(key).name for key in ("x", "new")}


def test_everything_stays_when_an_entry_is_larger_than_the_budget(folder: Folder) -> None:
    keep(folder, "x", bytes(90))
    assert not folder.make_room(101)
    assert folder.entry("x").exists()


def test_an_entry_is_replaced_when_it_is_kept_again(folder: Folder) -> None:
    for content in (b"damaged", b"whole"):
        keep(folder, KEY, content)
    assert folder.entry(KEY).read_bytes() == b"whole"


def test_alone_raises_when_the_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    folder = Folder(tmp_path / "file" / "packed", 100)
    with pytest.raises(OSError, match="file"), folder.alone(KEY, 0, lambda: None):
        pass


def test_folder_is_none_when_no_home_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(self: Path) -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "expanduser", unknown)
    assert folder_path("") is None
