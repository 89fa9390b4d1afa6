"""Writes what a version leaves on the disk: `freeze.py` has the previous version run it.

Imports nothing of the tests: it runs with that version's packages alone.
"""

import asyncio
import sqlite3
import sys
from pathlib import Path

from gateway.auth.usage import Spool
from services.auth import first_key, ledger, migrate
from services.auth.database import Database
from services.auth.values import UsageRow
from services.cache import log_file, records

KEY = "im-abcdefghijkl-" + "a" * 52
ROW = {
    "record_id": "record-1",
    "request_id": "request-1",
    "tenant_id": "local",
    "key_id": "abcdefghijkl",
    "model": "infermesh-demo",
    "endpoint": "chat",
    "status": "ok",
    "prompt_tokens": 11,
    "completion_tokens": 7,
    "cached_prompt_tokens": 3,
    "finished_unix_ms": 1_750_000_000_000,
}


def kept(number: int) -> records.Kept:
    """An answer of the cache."""
    exact, compatible = bytes([number]) * 32, bytes(32)
    where = ("local", "local", "infermesh-demo", "fingerprint", f"question {number}")
    return records.Kept(number, exact, compatible, *where, b"answer", 0.5, 1.0, 2e9, True, number)


def write_cache(folder: Path) -> None:
    """A snapshot, and a log with each kind of record."""
    folder.mkdir(parents=True)
    log_file.write_snapshot(folder / "000001.snapshot", [kept(1), kept(2)])
    log = log_file.LogFile(folder / "000001.log")
    vector = records.Embedded(2, "embedder", bytes(4 * 8))
    quarantined = records.Quarantined(1, bytes([1]) * 32, "local", "fingerprint", 2e9)
    log.append([kept(3), vector, records.Removed([1]), quarantined])
    log.sync()
    log.close()


def write_usage(folder: Path) -> None:
    """A spool that was not sent."""
    spool = Spool(folder)
    spool.append(ROW)  # type: ignore[arg-type]  # a row of that version
    spool.close()
    (segment,) = folder.iterdir()
    segment.rename(folder / "1.usage")


def write_auth(folder: Path) -> None:
    """A database with a tenant, a key and a request in the ledger, as SQL."""
    file, key_file = folder / "auth.sqlite3", folder / "key"
    key_file.write_text(KEY)
    asyncio.run(_fill(file, key_file))
    key_file.unlink()
    with sqlite3.connect(file) as connection:
        (folder / "auth.sql").write_text("\n".join(connection.iterdump()) + "\n")
    connection.close()
    for left in folder.glob("auth.sqlite3*"):
        left.unlink()


async def _fill(file: Path, key_file: Path) -> None:
    database = Database(f"sqlite:///{file}")
    await migrate.migrate(database)
    await first_key.ensure(database, key_file, lambda: 1_750_000_000.0)
    await ledger.Ledger(database).append([UsageRow(**ROW)])  # type: ignore[arg-type]  # as above
    await database.close()


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_cache(target / "cache")
    write_usage(target / "usage")
    write_auth(target)
