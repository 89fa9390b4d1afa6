"""Compiles every processor's library: `python -m services.shard.kernels.prebuild FOLDER`.

For images: where they run there is no compiler, and nothing can be written.
"""

import sys
from pathlib import Path

from services.shard.kernels.compiling import CannotCompile, prepare

# By the names that torch gives them.
CAPABILITIES = ("AVX2", "AVX512")


def main(arguments: list[str]) -> int:
    """Compiles; the exit status."""
    if len(arguments) != 1:
        sys.stderr.write("error: name the folder, and nothing else\n")
        return 1
    for capability in CAPABILITIES:
        try:
            library = prepare(capability, Path(arguments[0]), lambda: None)
        except CannotCompile as error:
            sys.stderr.write(f"error: no kernels for {capability}: {error}\n")
            return 1
        sys.stdout.write(f"{capability}: {library}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
