"""Whether the C++ kernels can be had here: they are never required, and tests of them need a
compiler and a processor for which there are any."""

import pytest
import torch

from services.shard.kernels.compiling import CannotCompile, find_compiler

CAPABILITY = torch.backends.cpu.get_cpu_capability()


def has_kernels() -> bool:
    try:
        find_compiler()
    except CannotCompile:
        return False
    return CAPABILITY in ("AVX2", "AVX512")


WHY_NOT = "no C++ compiler, or no kernels for this processor"
needs_kernels = pytest.mark.skipif(not has_kernels(), reason=WHY_NOT)
