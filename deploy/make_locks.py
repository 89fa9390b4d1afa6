"""Writes deploy/locks: every package of the images with the hashes of its files.

    control.txt        gateway, auth, scheduler
    compute-cpu.txt    what shard and cache need besides, without torch: its CPU builds have an
                       index of their own, and no place among PyPI's hashes
    compute-cuda.txt   the same with torch and CUDA

Versions are those of deploy/constraints.txt; `uv pip compile` finds the hashes.
"""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "deploy" / "locks"
# Of the images: their 3.11 has its patches; Debian's glibc has it, and torch's wheels want it.
_PYTHON, _PLATFORM = "3.11.13", "x86_64-manylinux_2_28"
_CUDA = re.compile(r"torch|triton|cuda-.+|nvidia-.+")


def parse(text: str) -> dict[str, str]:
    """Package name to its entry, hashes included."""
    entries = re.split(r"\n(?=\S)", text.strip())
    return {entry.partition("==")[0]: entry for entry in entries if not entry.startswith("#")}


def compiled(*extras: str) -> dict[str, str]:
    """The packages that some extras of pyproject.toml need."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--quiet"]
    command += ["--constraints", "deploy/constraints.txt", "--generate-hashes"]
    command += ["--python-version", _PYTHON, "--python-platform", _PLATFORM]
    command += ["--no-header", "--no-annotate", *(f"--extra={extra}" for extra in extras)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return parse(done.stdout)


def locks() -> Mapping[str, list[str]]:
    """File name to its entries."""
    control = compiled("control")
    both = compiled("control", "compute")
    more = {name: entry for name, entry in both.items() if name not in control}
    return {
        "control.txt": list(control.values()),
        "compute-cpu.txt": [entry for name, entry in more.items() if not _CUDA.fullmatch(name)],
        "compute-cuda.txt": list(more.values()),
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, entries in locks().items():
        (FOLDER / name).write_text("\n".join(entries) + "\n")
        sys.stdout.write(f"{FOLDER / name}: {len(entries)} packages\n")
