"""Where peers live on this machine, and how what they need is made: once, pinned, without root."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

HOME = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "infermesh" / "peers"


def made_once(folder: Path, recipe: str, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` unless it was by the same recipe; a half-made one is made anew."""
    done = folder / "made_by.txt"
    if not done.exists() or done.read_text() != recipe:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        done.write_text(recipe)
    return folder


def virtual_environment(name: str, packages: Sequence[str], unwanted: Sequence[str] = ()) -> Path:
    """Its Python.

    Args:
        packages: what pip installs, with versions.
        unwanted: dependencies that are removed again.
    """

    def install(folder: Path) -> None:
        run(sys.executable, "-m", "venv", str(folder))
        pip = (str(folder / "bin" / "python"), "-m", "pip")
        run(*pip, "install", "--quiet", *packages)
        if unwanted:
            run(*pip, "uninstall", "--quiet", "--yes", *unwanted)

    recipe = " ".join((*packages, *(f"without {one}" for one in unwanted)))
    return made_once(HOME / name, recipe, install) / "bin" / "python"


def debian_library(package: str, name: str) -> Path:
    """A shared library of a Debian package, without installing the package.

    Raises:
        RuntimeError: the package could not be had, or has no such file.
    """

    def unpack(folder: Path) -> None:
        run("apt-get", "download", package, cwd=folder)
        (archive,) = folder.glob("*.deb")
        run("dpkg", "-x", str(archive), str(folder))

    folder = made_once(HOME / "debian" / package, package, unpack)
    found = next(folder.rglob(name), None)
    if found is None:
        raise RuntimeError(f"{package} has no {name}")
    return found


def run(*command: str, cwd: Path | None = None) -> None:
    """One step of a set-up, at low priority.

    Raises:
        RuntimeError: it failed; the message is the end of what it printed.
    """
    done = subprocess.run(
        ("nice", "-n", "10", *command),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-4000:]}")
