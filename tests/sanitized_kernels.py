"""Compiles the kernels with AddressSanitizer and UBSan, and prints where they are; see Makefile.

    python -m tests.sanitized_kernels 8|16 [bytes]

16 is the code for AVX-512 processors; where this is none, its vectors are taken apart. With `bytes`
it is the code for processors that sum products of bytes.
"""

import sys
from pathlib import Path

import torch

from services.shard.kernels.compiling import prepare

# The first wrong access or undefined operation ends the process.
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g")
# A test makes threads late.
FLAGS = (*SANITIZERS, "-DINFERMESH_LATE")
TAKEN_APART = ("-DINFERMESH_WIDE", "-Wno-psabi")


def main() -> None:
    folder = Path.home() / ".cache/infermesh/kernels"
    is_wide = sys.argv[1] == "16"
    has_wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    capability = "AVX512" if is_wide and has_wide else "AVX2"
    flags = (*FLAGS, *(TAKEN_APART if is_wide and not has_wide else ()))
    if "bytes" in sys.argv[2:]:
        flags = (*flags, "-DINFERMESH_BYTE_SUMS")
    print(prepare(capability, folder, lambda: None, flags))


if __name__ == "__main__":
    main()
