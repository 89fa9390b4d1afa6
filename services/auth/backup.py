"""`python -m services.auth.backup FILE`: all of the auth database as one file, while auth runs.

Owns writing; what the file is, is `backup_file`'s. Keys are in it as hashes alone.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from alembic.runtime.migration import MigrationContext
from sqlalchemy.ext.asyncio import AsyncConnection

from infermesh.config import ConfigError, load
from infermesh.errors import AuthUnavailable
from infermesh.telemetry import logs
from services.auth.backup_file import Writer, to_json
from services.auth.database import Database
from services.auth.migrate import revisions
from services.auth.schema import metadata

_PAGE_ROWS = 1000
# Numbers that a database gives to its rows itself.
_OWN = {("usage", "id")}


def stored(table: sa.Table) -> list[sa.Column[object]]:
    """The columns that a backup has."""
    return [column for column in table.c if (table.name, column.name) not in _OWN]


async def backup(database: Database, path: Path) -> dict[str, int]:
    """Writes what one moment of the database held; the number of rows of each table.

    SQLite in WAL mode and PostgreSQL at REPEATABLE READ show a transaction one moment alone,
    whatever is written meanwhile.

    Raises:
        ConfigError: the database can't be read, or is of another version; or the file can't be
            written, and what was at `path` is still there.
    """
    try:
        async with database.snapshot() as connection:
            found = await connection.run_sync(_revision)
            if found != revisions()[-1]:
                raise ConfigError(
                    f"the auth database has schema {found or 'none'}; this version backs up "
                    f"{revisions()[-1]}: start auth, or run python -m services.auth.migrate, first"
                )
            with Writer(path, found) as writer:
                for table in metadata.sorted_tables:
                    await _write(connection, table, writer)
                return writer.finish()
    except AuthUnavailable as error:
        raise ConfigError(f"auth.database_url: {error.message}") from None


async def _write(connection: AsyncConnection, table: sa.Table, writer: Writer) -> None:
    columns = stored(table)
    rows = await connection.stream(sa.select(*columns), execution_options={"yield_per": _PAGE_ROWS})
    async for page in rows.partitions(_PAGE_ROWS):
        facts = ({c.name: to_json(v) for c, v in zip(columns, row, strict=True)} for row in page)
        await asyncio.to_thread(writer.rows, table.name, list(facts))


def _revision(connection: sa.Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


async def _run(path: Path, url: str) -> dict[str, int]:
    database = Database(url)
    try:
        return await backup(database, path)
    finally:
        await database.close()


def main() -> int:
    """Backs up and ends; the exit status."""
    logs.silence()
    words = sys.argv[1:]
    try:
        if not words or words[0].startswith("--"):
            raise ConfigError("usage: python -m services.auth.backup FILE [--section.name=value]")
        path = Path(words[0])
        counts = asyncio.run(_run(path, load(words[1:]).auth.database_url))
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{path}: {', '.join(_shown(counts))}\n")
    return 0


def _shown(counts: dict[str, int]) -> Iterator[str]:
    for name in ("tenants", "keys", "usage"):
        yield f"{counts[name]} {name}"


if __name__ == "__main__":
    sys.exit(main())
