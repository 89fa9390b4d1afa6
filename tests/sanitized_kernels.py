"""Compiles the kernels with AddressSanitizer and UBSan, and prints where they are; see Makefile.

    python -m tests.sanitized_kernels 8|16

16 is the code for AVX-512 processors, whose vectors are taken apart for this one.
"""

import sys
from pathlib import Path

import torch

from services.shard.kernels.compiling import prepare

# The first wrong access or undefined operation ends the process.
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g")
WIDTHS = {"8": (), "16": ("-DINFERMESH_WIDE", "-Wno-psabi")}


def main() -> None:
    folder = Path.home() / ".cache/infermesh/kernels"
    flags = (*FLAGS, *WIDTHS[sys.argv[1]])
    print(prepare(torch.backends.cpu.get_cpu_capability(), folder, lambda: None, flags))


if __name__ == "__main__":
    main()
