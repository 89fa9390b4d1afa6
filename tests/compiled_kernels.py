"""Whether the C++ kernels can be had here: they are never required, and tests of them need a
compiler and a processor for which there are any."""

import os
from pathlib import Path

import pytest
import torch

from services.shard.kernels.compiling import CannotCompile, find_compiler, prepare
from services.shard.kernels.library import Library, load
from services.shard.kernels.products import Packer
from services.shard.torch_loading import DEFAULT_FOLDER

FOLDER = Path(DEFAULT_FOLDER).expanduser()
# A library to test in place of the cached one: `make sanitize-kernels` sets it.
SWITCH = "INFERMESH_TEST_KERNELS"
CAPABILITY = torch.backends.cpu.get_cpu_capability()


def has_kernels() -> bool:
    try:
        find_compiler()
    except CannotCompile:
        return False
    return CAPABILITY in ("AVX2", "AVX512")


def kernels_sum_bytes() -> bool:
    """Products with codes of 8 bits round x to 8 bits, too."""
    return Packer(load(FOLDER, lambda: None)).sums_bytes


def with_byte_sums() -> Library:
    """The code for processors that sum products of bytes, in instructions that this one has."""
    return Library(prepare(CAPABILITY, FOLDER, lambda: None, ("-DINFERMESH_BYTE_SUMS",)))


def with_late_threads() -> Library:
    """Has `make_late`, see `cpp/team.cpp`."""
    given = os.environ.get(SWITCH)
    flags = ("-DINFERMESH_LATE",)
    return Library(Path(given) if given else prepare(CAPABILITY, FOLDER, lambda: None, flags))


WHY_NOT = "no C++ compiler, or no kernels for this processor"
needs_kernels = pytest.mark.skipif(not has_kernels(), reason=WHY_NOT)
