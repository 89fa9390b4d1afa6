"""`python -m services.shard.fetch`: a model's files on a volume, checked, for a shard to open."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from infermesh.errors import MeshError
from services.shard import source
from services.shard.fetch import bucket, checksum, placing

_HUB = "hf://"


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 where the folder is there, and is what was wanted."""
    flags = _parse(argv)
    begun = time.monotonic()
    try:
        if not flags.source:
            placing.verify(flags.folder, flags.checksum)
            found: str | None = flags.checksum
        else:
            found = placing.place(
                flags.folder, flags.checksum, lambda into: _download(flags.source, into)
            )
    except (MeshError, OSError) as error:
        what = f"{flags.source}: " if flags.source else ""
        sys.stderr.write(f"error: {what}{error}\n")
        return 1
    if found is None:
        sys.stdout.write(f"{flags.folder} is there\n")
    else:
        seconds = time.monotonic() - begun
        sys.stdout.write(f"{flags.folder} has the checksum {found} (in {seconds:.1f} s)\n")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m services.shard.fetch", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the model is to be")
    parser.add_argument(
        "--source",
        default="",
        help="hf://ORG/NAME@REVISION or s3://BUCKET/PREFIX; none: the folder is only checked",
    )
    parser.add_argument("--checksum", default="", help="sha256:…, of the folder's contents")
    flags = parser.parse_args(argv)
    if flags.checksum and not re.fullmatch(checksum.PREFIX + "[0-9a-f]{64}", flags.checksum):
        parser.error(f"--checksum {flags.checksum!r} is not sha256: and 64 hexadecimal digits")
    if not flags.source and not flags.checksum:
        parser.error("nothing to do: give --source, --checksum, or both")
    if flags.source and not flags.source.startswith((_HUB, bucket.SCHEME)):
        parser.error(f"--source {flags.source!r} begins neither with {_HUB} nor {bucket.SCHEME}")
    return flags


def _download(where: str, into: Path) -> None:
    if where.startswith(bucket.SCHEME):
        bucket.download(where, into)
    else:
        source.download(where.removeprefix(_HUB), with_weights=True, into=into)


if __name__ == "__main__":
    sys.exit(main())
