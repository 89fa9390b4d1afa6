"""A gateway in front of one fake replica."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.gateway_process import Edge, make_replicas, running_gateway


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    async with running_gateway(tmp_path, make_replicas(tmp_path)) as running:
        yield running
