"""What tests of several folders share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import Postgres, running_postgres


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


@pytest.fixture(scope="session", autouse=True)
def packed_weights_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where all models of a run keep their packed weights: not among the user's."""
    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.shard.packed_cache.folder.DEFAULT_FOLDER", str(folder))
        patch.setenv("INFERMESH_SHARD__PACKED_CACHE_DIR", str(folder))
        yield folder
