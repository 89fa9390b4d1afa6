"""Writes previous.tar.xz, the released version beside which the next one has to run, and what that
version leaves on the disk (samples/).

`make freeze-previous REV=<tag>` runs it right after a release. It packs what Python needs to run
the services, and the protos; neither tests nor the kernels' sources.
"""

import argparse
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ARCHIVE = Path(__file__).with_name("previous.tar.xz")
SAMPLES = Path(__file__).with_name("samples")
ROOT = Path(__file__).resolve().parents[2]
_PARTS = ("infermesh", "gateway", "services", "protos")
_LEFT_OUT = (":!infermesh/v1/*.pyi", ":!services/shard/kernels/cpp")


def freeze(revision: str) -> None:
    """Packs `revision`; the archive names its commit.

    Raises:
        CalledProcessError: git does not know the revision.
    """
    command = ("git", "archive", "--format=tar", revision, "--", *_PARTS, *_LEFT_OUT)
    packed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    ARCHIVE.write_bytes(lzma.compress(packed, preset=9 | lzma.PRESET_EXTREME))
    with tempfile.TemporaryDirectory() as folder:
        unpack(Path(folder))
        shutil.rmtree(SAMPLES, ignore_errors=True)
        SAMPLES.mkdir()
        writer = Path(__file__).with_name("write_samples.py").read_text()
        command = (sys.executable, "-c", writer, str(SAMPLES))
        environment = {**os.environ, "PYTHONPATH": folder}
        subprocess.run(command, cwd=folder, env=environment, check=True)


def unpack(folder: Path) -> Path:
    """The previous version below `folder`; its root."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def main() -> None:
    """`freeze.py REVISION` writes, `freeze.py --unpack FOLDER` reads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", nargs="?", help="a tag or commit: the release made last")
    parser.add_argument("--unpack", type=Path, help="only put the previous version there")
    arguments = parser.parse_args()
    if arguments.unpack is not None:
        unpack(arguments.unpack)
    elif arguments.revision:
        freeze(arguments.revision)
    else:
        parser.error("which release? make freeze-previous REV=v0.1.0")


if __name__ == "__main__":
    main()
