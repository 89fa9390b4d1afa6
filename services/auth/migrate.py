"""Brings a database to the newest schema, under a lock. Takes one of a later version only where
that says that it still has everything this one knows (docs/upgrading.md).

The auth service does it when it starts; `python -m services.auth.migrate` does it alone.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.ext.asyncio import AsyncConnection

from infermesh.config import ConfigError, load
from infermesh.errors import AuthUnavailable
from infermesh.telemetry import logs
from services.auth.database import Database
from services.auth.schema import counters

_FOLDER = Path(__file__).parent / "migrations"
# The oldest revision whose code works on the present schema. A migration that adds leaves it; one
# that takes away, or narrows, raises it to the revision that no longer needs what goes.
OLDEST_READER = "0002"
_OLDEST_READER = "oldest_reader"  # its row among the counters
_LOCK_KEY = 0x1F_AE5A  # of PostgreSQL's advisory lock: any number that is only ours


def revisions() -> list[str]:
    """All revisions, oldest first."""
    scripts = ScriptDirectory.from_config(_config())
    return [script.revision for script in reversed(list(scripts.walk_revisions()))]


async def migrate(database: Database, revision: str = "head") -> None:
    """Upgrades to `revision` in one transaction, which is also the lock.

    Raises:
        ConfigError: the database can't be reached or written, or its schema is a later version's.
    """
    try:
        async with database.writing() as connection:
            await lock(database, connection)
            await connection.run_sync(_upgrade, revision)
            if revision == "head":
                await connection.run_sync(_prove_writable)
    except AuthUnavailable as error:
        raise ConfigError(f"auth.database_url: {error.message}") from None


async def lock(database: Database, connection: AsyncConnection) -> None:
    """Until the transaction ends, no other auth process changes what all of them begin with."""
    if not database.is_sqlite:  # whose writing transactions exclude each other anyway
        await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_KEY)))


def _upgrade(connection: sa.Connection, revision: str) -> None:
    current = MigrationContext.configure(connection).get_current_revision()
    if current is not None and current not in revisions():
        if _may_read(connection):
            return
        raise ConfigError(
            f"auth.database_url: the database has schema {current}, which a later version of "
            f"infermesh wrote; this one knows up to {revisions()[-1]}"
        )
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, revision)
    if revision == "head":
        _say_oldest_reader(connection)


def _may_read(connection: sa.Connection) -> bool:
    """The later version that wrote the schema has left this one its part of it."""
    if not sa.inspect(connection).has_table(counters.name):
        return False
    said = sa.select(counters.c.value).where(counters.c.name == _OLDEST_READER)
    oldest = connection.execute(said).scalar_one_or_none()
    return oldest is not None and oldest <= int(revisions()[-1])


def _say_oldest_reader(connection: sa.Connection) -> None:
    row = {"name": _OLDEST_READER, "value": int(OLDEST_READER)}
    update = sa.update(counters).where(counters.c.name == _OLDEST_READER)
    if not connection.execute(update.values(value=row["value"])).rowcount:
        connection.execute(sa.insert(counters).values(**row))


def _prove_writable(connection: sa.Connection) -> None:
    """A database that can be read only would fail later, request by request."""
    connection.execute(sa.text("UPDATE counters SET value = value + 1 WHERE name = 'starts'"))


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_FOLDER))
    return config


async def _migrate_alone(url: str) -> None:
    database = Database(url)
    try:
        await migrate(database)
    finally:
        await database.close()


def main() -> int:
    """Migrates and ends; the exit status."""
    logs.silence()
    try:
        asyncio.run(_migrate_alone(load(sys.argv[1:]).auth.database_url))
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"the auth database has schema {revisions()[-1]}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
