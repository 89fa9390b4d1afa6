"""A gateway in front of one fake replica, with and without a fake cache."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.auth_process import Auth, running_auth
from tests.contract.gateway.cached import running
from tests.gateway_process import Edge, make_replicas, running_gateway
from tests.keyed_gateway import keyed_gateway
from tests.migrated import MigratedDatabases


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


@pytest.fixture
async def auth(tmp_path: Path, migrated: MigratedDatabases) -> AsyncIterator[Auth]:
    async with running_auth(tmp_path, migrated.sqlite(tmp_path / "auth.sqlite3")) as running:
        await running.tenant("acme")
        yield running


@pytest.fixture
async def keyed(tmp_path: Path, auth: Auth) -> AsyncIterator[Edge]:
    """A gateway that asks `auth`."""
    async with keyed_gateway(tmp_path / "gateway", auth) as running:
        yield running
