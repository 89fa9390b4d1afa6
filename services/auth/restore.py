"""`python -m services.auth.restore FILE [--replace]`: a backup into an empty database, of either
kind, in one transaction. Stop auth first: it keeps some of what it has read.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from infermesh.config import ConfigError, load
from infermesh.errors import AuthUnavailable
from infermesh.telemetry import logs
from services.auth import backup_file
from services.auth.backup import stored
from services.auth.database import Database
from services.auth.migrate import lock, migrate, revisions
from services.auth.schema import counters, metadata, tenants, usage, usage_days

_BATCH_ROWS = 500
# The feed of changes goes on from another place than any gateway can be at: all begin anew.
_CHANGES_AHEAD = 1_000_000


async def restore(database: Database, path: Path, *, replace: bool = False) -> Counter[str]:
    """Puts a backup into a database, all or nothing; the number of rows of each table.

    Args:
        replace: what the database holds is deleted.

    Raises:
        ConfigError: the file is no whole backup of a version that is known, the database can't be
            written, or it holds something.
        OSError: the file can't be read.
    """
    await asyncio.to_thread(backup_file.check, path, revisions())
    await migrate(database)
    try:
        async with database.writing() as connection:
            await lock(database, connection)
            await _make_room(connection, path, replace)
            counts = await _insert(connection, path)
            ahead = sa.update(counters).where(counters.c.name == "changes")
            await connection.execute(ahead.values(value=counters.c.value + _CHANGES_AHEAD))
            return counts
    except AuthUnavailable as error:
        raise ConfigError(f"auth.database_url: {error.message}") from None


async def _make_room(connection: AsyncConnection, path: Path, replace: bool) -> None:
    held = {
        table.name: await connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
        for table in (tenants, usage, usage_days)
    }
    if any(held.values()) and not replace:
        raise ConfigError(
            f"the auth database holds {held['tenants']} tenants and {held['usage']} usage rows; "
            f"--replace deletes them for what is in {path}"
        )
    for table in reversed(metadata.sorted_tables):
        await connection.execute(sa.delete(table))


async def _insert(connection: AsyncConnection, path: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    known = metadata.tables
    for name, group in itertools.groupby(backup_file.rows(path), key=lambda row: row[0]):
        if name not in known:
            raise ConfigError(f"{path} has a table {name!r}, which is unknown")
        columns = {column.name for column in stored(known[name])}
        while batch := list(itertools.islice(group, _BATCH_ROWS)):
            values = [_values(path, name, columns, row) for _, row in batch]
            await connection.execute(sa.insert(known[name]), values)
            counts[name] += len(values)
    return counts


def _values(path: Path, table: str, columns: set[str], row: dict[str, Any]) -> dict[str, Any]:
    """A column that a later migration added keeps its default."""
    if not row.keys() <= columns:
        unknown = ", ".join(sorted(row.keys() - columns))
        raise ConfigError(f"{path} has a column {table}.{unknown}, which is unknown")
    return {name: backup_file.from_json(value) for name, value in row.items()}


async def _run(path: Path, url: str, replace: bool) -> Counter[str]:
    database = Database(url)
    try:
        return await restore(database, path, replace=replace)
    finally:
        await database.close()


def main() -> int:
    """Restores and ends; the exit status."""
    logs.silence()
    words = sys.argv[1:]
    replace = "--replace" in words
    words = [word for word in words if word != "--replace"]
    try:
        if not words or words[0].startswith("--"):
            raise ConfigError(
                "usage: python -m services.auth.restore FILE [--replace] [--section.name=value]"
            )
        path = Path(words[0])
        counts = asyncio.run(_run(path, load(words[1:]).auth.database_url, replace))
    except (ConfigError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"restored {counts['tenants']} tenants, {counts['keys']} keys, ")
    sys.stdout.write(f"{counts['usage']} usage rows\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
