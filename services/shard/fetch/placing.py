"""A folder that is there whole or not at all, downloaded by one process of all that want it.

The name of the folder is the promise: what has it is complete and was checked. Until then files
are in `.NAME.part` beside it, where an attempt that died is taken up again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from infermesh.errors import ModelLoadFailed
from services.shard.fetch import checksum

# Of the hub's client, about the files beside it.
_NOTES = ".cache"


def place(folder: Path, wanted: str, download: Callable[[Path], None]) -> str | None:
    """Makes the folder, unless it is there.

    Args:
        wanted: its checksum; empty: any.
        download: fills a folder, in which files of an attempt that died may be.

    Returns:
        The checksum of what was downloaded; None where the folder was there.

    Raises:
        ModelLoadFailed: the download failed, or is not what was wanted (nothing of it is kept).
        OSError: the volume can't be written.
    """
    if folder.is_dir():
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part")
    with _alone(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():  # made while this process waited
            return None
        part.mkdir(exist_ok=True)
        download(part)
        shutil.rmtree(part / _NOTES, ignore_errors=True)
        found = checksum.of_folder(part)
        if wanted and found != wanted:
            shutil.rmtree(part)
            raise ModelLoadFailed(f"its checksum is {found}, but {wanted} was wanted")
        _settle(part)
        part.rename(folder)
    return found


def verify(folder: Path, wanted: str) -> None:
    """Raises ModelLoadFailed where a folder that somebody else filled is not what was wanted."""
    if not folder.is_dir():
        raise ModelLoadFailed(f"{folder} is not a directory")
    found = checksum.of_folder(folder)
    if found != wanted:
        raise ModelLoadFailed(f"the checksum of {folder} is {found}, but {wanted} was wanted")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Among all processes of all pods on the volume; the lock of one that died is free."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _settle(folder: Path) -> None:
    """Everything is on the disk before the name says so."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
