"""What tests of several folders share."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.postgres import Postgres, running_postgres
from tests.redis_server import RedisServer, running_redis

if TYPE_CHECKING:
    from tests.migrated import MigratedDatabases


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One cluster for the whole run; each test has databases of its own."""
    with running_postgres() as cluster:
        yield cluster


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new, empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'auth.sqlite3'}"
    cluster: Postgres = request.getfixturevalue("postgres")
    return cluster.create_database()


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> "MigratedDatabases":
    """For tests that need tables, but are not about their migration."""
    from tests.migrated import MigratedDatabases  # most tests need no database

    return MigratedDatabases(tmp_path_factory.mktemp("migrated"))


@pytest.fixture(params=["sqlite", "postgresql"])
def migrated_url(
    request: pytest.FixtureRequest, migrated: "MigratedDatabases", tmp_path: Path
) -> str:
    """A new database of either kind, with the newest tables and nothing in them."""
    if request.param == "sqlite":
        return migrated.sqlite(tmp_path / "auth.sqlite3")
    return migrated.postgresql(request.getfixturevalue("postgres"))


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One server for the whole run; each test has a database of its own, and stops nothing."""
    with running_redis() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql", "redis"])
def lease_store(
    request: pytest.FixtureRequest, migrated: "MigratedDatabases", tmp_path: Path
) -> dict[str, str]:
    """The settings of an auth service whose leases are in a new, empty store of each kind."""
    if request.param == "postgresql":
        return {"database_url": migrated.postgresql(request.getfixturevalue("postgres"))}
    store = {"database_url": migrated.sqlite(tmp_path / "auth.sqlite3")}
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        store["redis_url"] = server.new_database()
    return store


@pytest.fixture(scope="session", autouse=True)
def packed_weights_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where all models of a run keep their packed weights: not among the user's."""
    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.shard.packed_cache.folder.DEFAULT_FOLDER", str(folder))
        patch.setenv("INFERMESH_SHARD__PACKED_CACHE_DIR", str(folder))
        yield folder
