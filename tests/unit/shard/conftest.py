"""The kernel library for tests, compiled once per machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from services.shard.kernels.library import Library, load
from tests.compiled_kernels import FOLDER, SWITCH, WHY_NOT, has_kernels


@pytest.fixture(scope="session")
def kernels() -> Library:
    """Kernels that should be there and don't compile fail the tests of them."""
    given = os.environ.get(SWITCH)
    if given:
        return Library(Path(given))
    if not has_kernels():
        pytest.skip(WHY_NOT)
    return load(FOLDER, lambda: None)


@pytest.fixture(autouse=True)
def _as_many_threads_as_before() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
