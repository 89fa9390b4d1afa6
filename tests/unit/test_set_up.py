"""Making the environment: what is there already, what is torn, what is of the other kind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploy import set_up


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would be installed, in order; nothing is."""
    done: list[str] = []
    monkeypatch.setattr(set_up, "_create", lambda folder: done.append("create"))
    monkeypatch.setattr(set_up, "_install_torch", lambda python, accel: done.append(accel))
    monkeypatch.setattr(set_up, "_pip", lambda *arguments: done.append("rest"))
    monkeypatch.setattr(set_up, "_refuse_cuda_packages", lambda python: None)
    return done


def with_torch(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(set_up, "_has_pip", lambda python: True)
    monkeypatch.setattr(set_up, "_torch_version", lambda python: version)


def a_python(folder: Path) -> Path:
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(sys.executable)
    return folder


def test_environment_is_made_when_there_is_none(tmp_path: Path, steps: list[str]) -> None:
    set_up.set_up(tmp_path / "venv", "cpu", dev=False)
    assert steps == ["create", "cpu", "rest"]


@pytest.mark.parametrize(("accel", "version"), [("cpu", "2.13.0+cpu"), ("cuda", "2.13.0")])
def test_torch_is_kept_when_it_is_the_right_one(
    tmp_path: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch, accel: str, version: str
) -> None:
    with_torch(monkeypatch, version)
    set_up.set_up(a_python(tmp_path), accel, dev=False)
    assert steps == ["rest"]


@pytest.mark.parametrize(("accel", "version"), [("cuda", "2.13.0+cpu"), ("cpu", "2.13.0")])
def test_environment_is_made_anew_when_it_is_of_the_other_kind(
    tmp_path: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch, accel: str, version: str
) -> None:
    with_torch(monkeypatch, version)
    set_up.set_up(a_python(tmp_path), accel, dev=False)
    assert steps == ["create", accel, "rest"]


def test_environment_is_made_anew_when_it_has_no_pip(
    tmp_path: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(set_up, "_has_pip", lambda python: False)
    set_up.set_up(a_python(tmp_path), "cpu", dev=False)
    assert steps[0] == "create"


def test_nothing_is_left_when_the_environment_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, **_: object) -> None:
        folder.mkdir()
        raise subprocess.CalledProcessError(1, "ensurepip")

    monkeypatch.setattr(set_up.venv, "create", fail)
    with pytest.raises(set_up.SetupError, match="python3-venv"):
        set_up.set_up(tmp_path / "venv", "cpu", dev=False)
    assert not (tmp_path / "venv").exists()


def test_unsupported_python_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(set_up.sys, "version_info", (3, 10, 4))
    with pytest.raises(set_up.SetupError, match=r"Python 3\.10 is not supported"):
        set_up.set_up(tmp_path, "cpu", dev=False)


def test_failed_installation_names_the_reason(tmp_path: Path) -> None:
    pip = tmp_path / "python"
    pip.write_text("#!/bin/sh\necho 'no room on the disk' >&2\nexit 1\n")
    pip.chmod(0o755)
    with pytest.raises(set_up.SetupError, match=r"installing it failed: no room on the disk"):
        set_up._pip(pip, "it")
