"""Compiles every processor's library: `python -m services.shard.kernels.prebuild FOLDER`.

For images: where they run there is no compiler, and nothing can be written.
"""

import sys
from pathlib import Path

from services.shard.kernels.compiling import CannotCompile, prepare

# What torch says of a processor, and what Linux does of it that matters here.
PROCESSORS = (
    ("AVX2", frozenset[str]()),
    ("AVX2", frozenset({"avx_vnni"})),
    ("AVX512", frozenset[str]()),
    ("AVX512", frozenset({"avx512_vnni"})),
    ("AVX512", frozenset({"avx512_vnni", "avx512_bf16"})),
)


def main(arguments: list[str]) -> int:
    """Compiles; the exit status."""
    if len(arguments) != 1:
        sys.stderr.write("error: name the folder, and nothing else\n")
        return 1
    for capability, features in PROCESSORS:
        try:
            library = prepare(capability, Path(arguments[0]), lambda: None, features=features)
        except CannotCompile as error:
            sys.stderr.write(f"error: no kernels for {capability}: {error}\n")
            return 1
        sys.stdout.write(f"{capability}: {library}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
