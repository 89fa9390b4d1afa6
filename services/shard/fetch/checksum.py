"""One number for the contents of a folder, which an operator's own shell can compute, too.

    cd FOLDER && find -L . -type f -printf '%P\\n' | LC_ALL=C sort \\
      | xargs -d '\\n' sha256sum | sha256sum
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from pathlib import Path

PREFIX = "sha256:"
# Of ext4, root's alone.
_NOT_OURS = "lost+found"
_READERS = 4


def of_folder(folder: Path) -> str:
    """`sha256:` and the hash over every file's hash and name, links followed.

    Raises:
        OSError: a file or a folder can't be read.
    """
    names = sorted(_names(folder), key=os.fsencode)
    # hashing leaves the interpreter's lock to others
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        hashes = pool.map(lambda name: _of_file(folder / name), names)
        lines = [f"{digest}  {name}\n" for digest, name in zip(hashes, names, strict=True)]
    return PREFIX + hashlib.sha256(os.fsencode("".join(lines))).hexdigest()


def _names(folder: Path) -> list[str]:
    found = []

    def stop(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if name != _NOT_OURS]
        found += [(Path(place) / name).relative_to(folder).as_posix() for name in files]
    return found


def _of_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
