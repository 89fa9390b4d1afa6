"""One embedding model for all tests of this folder: loading it takes seconds."""

from __future__ import annotations

import pytest

from services.cache import minilm
from services.cache.embedding import BUILTIN


@pytest.fixture(scope="session")
def embedder() -> minilm.MiniLm:
    return minilm.load(BUILTIN, "cpu", 1)
