"""Databases with the newest schema and nothing in them: migrated once a run, then copied.

For tests that are about something else than how the tables come to be.
"""

import asyncio
import shutil
from pathlib import Path

from services.auth.database import Database
from services.auth.migrate import migrate
from tests.postgres import Postgres


class MigratedDatabases:
    """Copies of one database of each kind.

    Args:
        folder: of the SQLite file that is copied.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "migrated.sqlite3"
        asyncio.run(_migrate(f"sqlite:///{self._file}"))
        self._templates: dict[Postgres, str] = {}

    def sqlite(self, path: Path) -> str:
        """The URL of a new database at `path`."""
        shutil.copy(self._file, path)
        return f"sqlite:///{path}"

    def postgresql(self, cluster: Postgres) -> str:
        """The URL of a new database of the cluster."""
        if cluster not in self._templates:
            url = cluster.create_database()
            asyncio.run(_migrate(url))
            self._templates[cluster] = url
        return cluster.create_database(self._templates[cluster])


async def _migrate(url: str) -> None:
    database = Database(url)
    await migrate(database)
    await database.close()
