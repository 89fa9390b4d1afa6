"""docs/upgrading.md names commands, targets, files and names in the code that exist."""

import re
from typing import Any

import pytest
import typer

from infermesh.cli import app
from tests.skew.freeze import ROOT

GUIDE = (ROOT / "docs" / "upgrading.md").read_text()
COMMANDS = sorted(set(re.findall(r"^infermesh [^#\n]*|(?<=`)infermesh [a-z][^`]*", GUIDE, re.M)))
TARGETS = sorted(set(re.findall(r"make ([a-z][a-z-]+)", GUIDE)))
PATHS = sorted(set(re.findall(r"(?:tests|services|infermesh|deploy|docs)/[\w./-]*\w", GUIDE)))
NAMES = {
    "infermesh/version.py": ("PROTOCOL", "OLDEST_PROTOCOL"),
    "services/auth/migrate.py": ("OLDEST_READER", "oldest_reader"),
    "infermesh/version_guard.py": ("versions differ",),
    "services/scheduler/shard_loop.py": ("the shard is not connected",),
    "gateway/auth/usage.py": (".refused",),
    "services/cache/recovery.py": (".damaged",),
    "gateway/http/admin.py": ("/debug/replicas", '"version"'),
}


@pytest.mark.parametrize("line", COMMANDS)
def test_command_and_its_flags_exist(line: str) -> None:
    words = line.split()[1:]
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("target", TARGETS)
def test_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("path", PATHS)
def test_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", NAMES)
def test_what_the_guide_quotes_is_in_the_code(path: str) -> None:
    text = (ROOT / path).read_text()
    assert all(name in text and name.strip('"') in GUIDE for name in NAMES[path])
