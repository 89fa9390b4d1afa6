"""A folder's checksum is the shell's, and that of its contents alone."""

import os
import subprocess
from pathlib import Path

import pytest

from infermesh.errors import ModelLoadFailed
from services.shard.fetch import checksum, placing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name in ("b", "a b", "Z", "é", "sub/a", "sub-a", ".hidden"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "link").symlink_to("b")
    return folder


def test_checksum_is_what_the_documented_shell_line_says(folder: Path) -> None:
    line = (checksum.__doc__ or "").split("\n\n")[1]
    assert "sha256sum" in line

    done = subprocess.run(
        ["sh", "-c", line.replace("FOLDER", str(folder))],
        capture_output=True,
        text=True,
        check=True,
    )

    assert checksum.of_folder(folder) == f"sha256:{done.stdout.split()[0]}"


@pytest.mark.parametrize("change", ["contents", "name", "one more", "one less"])
def test_checksum_changes_with_contents_and_names(folder: Path, change: str) -> None:
    before = checksum.of_folder(folder)
    if change == "contents":
        (folder / "sub" / "a").write_text("other")
    elif change == "name":
        (folder / "b").rename(folder / "c")
        (folder / "link").unlink()
        (folder / "link").symlink_to("c")
    elif change == "one more":
        (folder / "empty").touch()
    else:
        (folder / ".hidden").unlink()

    assert checksum.of_folder(folder) != before


def test_checksum_leaves_out_what_a_file_system_keeps_on_a_volume(folder: Path) -> None:
    before = checksum.of_folder(folder)
    (folder / "lost+found").mkdir()
    os.utime(folder / "b", (0, 0))

    assert checksum.of_folder(folder) == before


def test_a_folder_that_somebody_else_filled_is_verified(folder: Path) -> None:
    placing.verify(folder, checksum.of_folder(folder))

    with pytest.raises(ModelLoadFailed, match="was wanted"):
        placing.verify(folder, checksum.PREFIX + "0" * 64)
    with pytest.raises(ModelLoadFailed, match="not a directory"):
        placing.verify(folder / "b", checksum.PREFIX + "0" * 64)


def test_a_folder_is_not_there_before_all_of_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def die(into: Path) -> None:
        (into / "a").write_text("a")
        raise ModelLoadFailed("the hub is out of reach")

    with pytest.raises(ModelLoadFailed, match="out of reach"):
        placing.place(folder, "", die)

    assert not folder.exists()
    assert (tmp_path / ".model.part" / "a").read_text() == "a"
