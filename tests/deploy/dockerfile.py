"""Executes the steps of deploy/Dockerfile without a container engine: in a folder for each stage.

Absolute paths of the image that steps make or read (/opt, /app and others) are folders here;
everything else is this machine's, as the base image's would be. apt-get is not run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_OWN = re.compile(r"(?<![\w./-])/(?=(?:opt|app|locks|var/lib/infermesh|run/infermesh)(?:/|\b))")
_VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass
class Stage:
    """What a stage has when it ends."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "root"
    labels: dict[str, str] = field(default_factory=dict)

    def place(self, path: str) -> Path:
        """A path of the image, here."""
        return self.root / path.lstrip("/")


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Word and rest of each; comments are dropped, lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        yield word, rest.strip()


class Build:
    """One build.

    Args:
        folder: of the stages' roots.
        arguments: over the ARGs' defaults.
    """

    def __init__(self, folder: Path, arguments: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._arguments = dict(arguments or {})
        self._text = (ROOT / "deploy" / "Dockerfile").read_text()
        self._global: dict[str, str] = {}
        self.skipped: list[str] = []

    def target(self, name: str) -> Stage:
        """Builds a stage and those that it needs."""
        return self._build(name, {})

    def _build(self, name: str, made: dict[str, Stage]) -> Stage:
        if name in made:
            return made[name]
        parent, steps = self._sections()[name]
        root = self._folder / name
        if parent in self._sections():
            base = self._build(parent, made)
            shutil.copytree(base.root, root, symlinks=True)
            stage = Stage(root, dict(base.environment), base.workdir, base.user)
        else:
            root.mkdir(parents=True)
            stage = Stage(root)
        declared: dict[str, str] = {}
        for word, rest in steps:
            self._step(stage, word, rest, declared, made)
        made[name] = stage
        return stage

    def _sections(self) -> dict[str, tuple[str, list[tuple[str, str]]]]:
        """Stage to its parent and its steps."""
        found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
        current: list[tuple[str, str]] = []
        for word, rest in instructions(self._text):
            if word == "FROM":
                parent, _, name = rest.partition(" AS ")
                current = []
                found[name] = (self._expand(parent, self._global), current)
            elif not found:
                assert word == "ARG", f"{word} before FROM"
                key, _, default = rest.partition("=")
                self._global[key] = self._arguments.get(key, default)
            else:
                current.append((word, rest))
        return found

    def _expand(self, text: str, values: Mapping[str, str]) -> str:
        return _VARIABLE.sub(lambda match: values[match[1]], text)

    def _step(
        self, stage: Stage, word: str, rest: str, declared: dict[str, str], made: dict[str, Stage]
    ) -> None:
        rest = self._expand(rest, {**stage.environment, **declared})
        if word == "ARG":
            key, _, default = rest.partition("=")
            declared[key] = self._arguments.get(key, default or self._global.get(key, ""))
        elif word == "ENV":
            stage.environment.update(part.split("=", 1) for part in shlex.split(rest))
        elif word == "WORKDIR":
            stage.workdir = rest
            stage.place(rest).mkdir(parents=True, exist_ok=True)
        elif word == "USER":
            stage.user = rest
        elif word == "LABEL":
            stage.labels.update(part.split("=", 1) for part in shlex.split(rest))
        elif word == "HEALTHCHECK":
            assert rest == "NONE", "this one would have to be run"
        elif word == "COPY":
            self._copy(stage, rest, made)
        elif word == "RUN":
            self._run(stage, rest)
        else:
            raise AssertionError(f"what does {word} do?")

    def _copy(self, stage: Stage, rest: str, made: dict[str, Stage]) -> None:
        words = rest.split()
        if words[0].startswith("--from="):
            source = self._build(words.pop(0).removeprefix("--from="), made).place(words[0])
        else:
            source = ROOT / words[0]
            assert self._in_context(words[0]), f".dockerignore leaves {words[0]} out"
        target = stage.place(words[1])
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__") if ROOT in source.parents else None
            shutil.copytree(source, target, symlinks=True, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)

    def _in_context(self, path: str) -> bool:
        lines = (ROOT / ".dockerignore").read_text().split()
        assert lines[0] == "*"
        kept = [line.removeprefix("!") for line in lines if line.startswith("!")]
        return any(path == one or path.startswith(f"{one}/") for one in kept)

    def _run(self, stage: Stage, command: str) -> None:
        if command.startswith("apt-get "):
            self.skipped.append(command)
            return
        local = _OWN.sub(f"{stage.root}/", command)
        environment = run_environment(stage, Path(sys.base_prefix) / "bin")
        done = subprocess.run(
            ["/bin/sh", "-ec", local],
            cwd=stage.place(stage.workdir),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def run_environment(stage: Stage, base: Path) -> dict[str, str]:
    """A container's, with the image's paths here; `base`: of the Python that the base image has."""
    own = {key: _OWN.sub(f"{stage.root}/", value) for key, value in stage.environment.items()}
    own["PATH"] = own["PATH"].replace("/usr/local/bin", str(base))
    pip = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
    return {**pip, **own}


def size_bytes(folder: Path) -> int:
    """Of all files below it, each counted once."""
    seen = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            facts = path.stat()
            seen[facts.st_ino] = facts.st_size
    return sum(seen.values())
