"""What a peer needs is made once by one recipe, and anew where it was left half made."""

from pathlib import Path

import pytest

from benchmarks.peers.environment import made_once, run


def test_folder_is_made_once_per_recipe(tmp_path: Path) -> None:
    made: list[str] = []
    for recipe in ("one", "one", "two", "two"):

        def make(folder: Path, recipe: str = recipe) -> None:
            assert list(folder.iterdir()) == []
            made.append(recipe)
            (folder / recipe).touch()

        folder = made_once(tmp_path / "folder", recipe, make)
    assert made == ["one", "two"]
    assert (folder / "two").exists()
    assert not (folder / "one").exists()


def test_folder_is_made_anew_when_making_it_failed(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("no disk")

    with pytest.raises(RuntimeError, match="no disk"):
        made_once(tmp_path / "folder", "recipe", fail)
    folder = made_once(tmp_path / "folder", "recipe", lambda folder: (folder / "whole").touch())
    assert (folder / "whole").exists()
    assert not (folder / "half").exists()


def test_step_of_a_set_up_says_what_it_printed_when_it_fails() -> None:
    run("sh", "-c", "exit 0")
    with pytest.raises(RuntimeError, match=r"(?s)sh -c .*: exit 3\nno such thing"):
        run("sh", "-c", "echo no such thing >&2; exit 3")
