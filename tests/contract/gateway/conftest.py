"""A gateway in front of one fake replica, with and without a fake cache."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.contract.gateway.cached import running
from tests.gateway_process import Edge, make_replicas, running_gateway


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    async with running_gateway(tmp_path, make_replicas(tmp_path)) as running:
        yield running


@pytest.fixture
async def cached(tmp_path: Path) -> AsyncIterator[Edge]:
    async with running(tmp_path) as edge:
        yield edge


@pytest.fixture
async def eager(tmp_path: Path) -> AsyncIterator[Edge]:
    """Schedules at once, and then holds a stream's first token for as long as it takes."""
    async with running(tmp_path, cache_head_start_ms=0.0) as edge:
        yield edge
