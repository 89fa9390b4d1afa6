"""Snapshots of what the chart renders. `python -m tests.deploy.golden` writes them anew."""

import sys
from pathlib import Path

from tests.deploy import chart

_FOLDER = Path(__file__).parent / "golden"


def file_of(example: Path) -> Path:
    """The snapshot of an example."""
    return _FOLDER / example.name


def write() -> None:
    """All of them, and none besides."""
    _FOLDER.mkdir(exist_ok=True)
    for old in _FOLDER.glob("*.yaml"):
        old.unlink()
    for example in chart.EXAMPLES:
        file_of(example).write_text(chart.snapshot(chart.example(example)))
        sys.stdout.write(f"{file_of(example)} is written\n")


if __name__ == "__main__":
    write()
