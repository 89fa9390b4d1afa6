"""The connection to SQLite or PostgreSQL: transactions, and its failures as one error each.

Owns the engine. SQL runs in the driver's thread (SQLite) or on sockets (PostgreSQL), never in the
event loop.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from infermesh.config import ConfigError
from infermesh.errors import AuthUnavailable
from infermesh.telemetry import logs

_log = logs.get(__name__)
_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
_BUSY_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 5.0
_COMMAND_TIMEOUT_S = 10.0
_RETRY_AFTER_S = 1.0
_POOL_SIZE = 8

# Time and length of a database's files.
Trace: TypeAlias = tuple[tuple[int, int], ...]


def async_url(text: str) -> URL:
    """The URL with the asynchronous driver of its kind of database.

    Raises:
        ConfigError: it is no URL, or of another kind of database.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme = ""
    if scheme == "postgres":
        text = f"postgresql://{rest}"
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ConfigError(
            # the value may hold a password
            f"auth.database_url is no database URL (scheme {scheme[:20]!r}); "
            "sqlite:///PATH and postgresql://USER@HOST/NAME are"
        ) from None
    kind = url.get_backend_name()
    if kind not in _DRIVERS:
        raise ConfigError(f"auth.database_url names a {kind} database; use sqlite or postgresql")
    return url.set(drivername=_DRIVERS[kind])


class Database:
    """One database.

    Raises:
        ConfigError: the URL can't be used.
    """

    def __init__(self, url: str) -> None:
        self.url = async_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self._engine = self._create()

    @property
    def name(self) -> str:
        """For messages: the URL without its password."""
        return self.url.render_as_string(hide_password=True)

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that only reads.

        Raises:
            AuthUnavailable: the database does not answer.
        """
        with self._failures():
            async with self._engine.connect() as connection, connection.begin():
                yield connection

    @contextlib.asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that only reads, and sees one moment of the database however long it takes.

        Raises:
            AuthUnavailable: the database does not answer.
        """
        with self._failures():
            async with self._engine.connect() as connection:
                if not self.is_sqlite:  # where every reader of a WAL sees one moment
                    await connection.execution_options(isolation_level="REPEATABLE READ")
                async with connection.begin():
                    yield connection

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that writes; on SQLite it has the database to itself from the start.

        Raises:
            AuthUnavailable: the database does not answer, or can't be written.
        """
        with self._failures():
            async with self._engine.connect() as connection:
                await connection.execution_options(infermesh_writes=True)
                async with connection.begin():
                    yield connection

    def trace(self) -> Trace | None:
        """What every committed write changes, without asking the database; None where there is no
        such thing."""
        path = self.url.database
        if not self.is_sqlite or not path or path.startswith("file:"):
            return None
        try:
            found = [os.stat(name) for name in (path, f"{path}-wal")]
        except OSError:  # no log, or no database: to ask it says which
            return None
        return tuple((one.st_mtime_ns, one.st_size) for one in found)

    async def close(self) -> None:
        """Closes every connection."""
        await self._engine.dispose()

    def _create(self) -> AsyncEngine:
        if not self.is_sqlite:
            return create_async_engine(
                self.url,
                pool_size=_POOL_SIZE,
                pool_pre_ping=True,
                connect_args={"timeout": _CONNECT_TIMEOUT_S, "command_timeout": _COMMAND_TIMEOUT_S},
            )
        folder = Path(self.url.database or "").parent
        if self.url.database and not self.url.database.startswith("file:") and not folder.is_dir():
            raise ConfigError(f"auth.database_url is {self.name}, but there is no folder {folder}")
        if folder.is_dir() and self.url.database:
            with contextlib.suppress(OSError):  # the connection will say it better
                os.close(os.open(self.url.database, os.O_CREAT | os.O_RDWR, 0o600))
        engine = create_async_engine(
            self.url, pool_size=_POOL_SIZE, connect_args={"timeout": _BUSY_TIMEOUT_S}
        )
        sa.event.listen(engine.sync_engine, "connect", _set_up_sqlite)
        sa.event.listen(engine.sync_engine, "begin", _begin_sqlite)
        return engine

    @contextlib.contextmanager
    def _failures(self) -> Any:
        try:
            yield
        except (OperationalError, InterfaceError, PoolTimeout, OSError, TimeoutError) as error:
            raise self._unavailable(error) from None
        except DBAPIError as error:
            # the base class is what the driver has no name for: no such database, a shutdown
            unnamed = type(error) is DBAPIError
            if unnamed or error.connection_invalidated or "read-only" in str(error.orig):
                raise self._unavailable(error) from None
            raise

    def _unavailable(self, error: BaseException) -> AuthUnavailable:
        cause = error.orig if isinstance(error, DBAPIError) else error
        _log.error("database failed", extra={"database": self.name, "error": str(cause)})
        what = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        return AuthUnavailable(
            f"the auth database {self.name} can't be used: {what.strip()}",
            retry_after_s=_RETRY_AFTER_S,
        )


def _set_up_sqlite(connection: Any, record: object) -> None:
    del record
    # transactions are begun by `_begin_sqlite`, not by the driver before some statements
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        with contextlib.suppress(Exception):  # a database that can't be written says so later
            cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("infermesh_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
