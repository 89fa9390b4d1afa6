"""One file holds one moment of the database, and becomes a database of either kind again."""

import asyncio
import gzip
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from infermesh import rpc
from infermesh.config import ConfigError
from infermesh.v1 import auth_admin_service_pb2 as admin_pb
from infermesh.v1 import auth_service_pb2 as pb
from infermesh.v1.auth_service_pb2_grpc import AuthServiceStub
from services.auth import api_key
from services.auth.backup import backup
from services.auth.backup_file import Writer
from services.auth.changes import latest
from services.auth.database import Database
from services.auth.restore import restore
from services.auth.schema import metadata, usage
from tests.auth_child import AuthChild
from tests.auth_process import Auth, running_auth
from tests.postgres import Postgres


def records(start: int, count: int) -> Iterator[pb.RecordUsageRequest]:
    for number in range(start, start + count):
        yield pb.RecordUsageRequest(
            record=pb.UsageRecord(
                record_id=f"r{number}",
                tenant_id="acme",
                key_id="k",
                model="tiny",
                prompt_tokens=1000,
                end_user="ann",
                labels={"team": "a"},
                finished_unix_ms=int(time.time() * 1000) + 60_000,
            )
        )


@pytest.fixture
async def other_url(tmp_path: Path, database_url: str, postgres: Postgres) -> str:
    """An empty database of the other kind."""
    if database_url.startswith("sqlite"):
        return postgres.create_database()
    return f"sqlite:///{tmp_path / 'other.sqlite3'}"


async def fill(auth: Auth, num_rows: int) -> str:
    """A tenant with a key and usage; the key's text."""
    await auth.tenant("acme", tokens_per_minute=100)
    text, _ = await auth.key("acme")
    await auth.stub.RecordUsage(records(0, num_rows))
    return text


async def contents(url: str) -> dict[str, list[Any]]:
    """Every table's rows in order; not the ids that the database gives."""
    database = Database(url)
    found = {}
    async with database.reading() as connection:
        for table in metadata.sorted_tables:
            columns = [column for column in table.c if column is not usage.c.id]
            rows = await connection.execute(sa.select(*columns))
            found[table.name] = sorted(map(tuple, rows), key=repr)
    await database.close()
    return found


async def saved(url: str, path: Path) -> None:
    database = Database(url)
    await backup(database, path)
    await database.close()


async def loaded(url: str, path: Path, *, replace: bool = False) -> None:
    database = Database(url)
    try:
        await restore(database, path, replace=replace)
    finally:
        await database.close()


async def test_backup_of_one_kind_of_database_becomes_the_other_and_comes_back(
    tmp_path: Path, database_url: str, other_url: str
) -> None:
    async with running_auth(tmp_path, database_url, prices=("tiny prompt=1",)) as auth:
        text = await fill(auth, 1200)
        await saved(database_url, tmp_path / "one")
        before = await contents(database_url)
    await loaded(other_url, tmp_path / "one")
    await saved(other_url, tmp_path / "two")
    await loaded(database_url, tmp_path / "two", replace=True)
    for url in (other_url, database_url):
        after = await contents(url)
        for name in before.keys() - {"counters"}:
            assert after[name] == before[name], name
    async with running_auth(tmp_path, other_url, prices=("tiny prompt=1",)) as auth:
        answer = await auth.stub.Authenticate(pb.AuthenticateRequest(api_key=text))
        assert answer.principal.limits.tokens_per_minute == 100
        assert (await auth.stub.RecordUsage(records(0, 1201))).num_stored == 1
        (total,) = await auth.usage()
        assert (total.num_requests, total.cost) == (1201, "1.201")


async def test_backup_is_private_and_has_no_key_in_it(tmp_path: Path, database_url: str) -> None:
    path = tmp_path / "auth.backup"
    async with running_auth(tmp_path, database_url) as auth:
        text = await fill(auth, 1)
        await saved(database_url, path)
    assert path.stat().st_mode & 0o777 == 0o600
    secret = text.rsplit("-", 1)[-1].encode()
    assert secret not in gzip.decompress(path.read_bytes())
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".draft")]


async def test_gateways_begin_their_watch_anew_after_a_restore(
    tmp_path: Path, database_url: str
) -> None:
    path = tmp_path / "auth.backup"
    async with running_auth(tmp_path, database_url) as auth:
        await fill(auth, 1)
        await saved(database_url, path)
        await auth.admin.UpdateTenant(
            admin_pb.UpdateTenantRequest(id="acme", limits=pb.TenantLimits())
        )
        database = Database(database_url)
        async with database.reading() as connection:
            number = await latest(connection)
        await database.close()
    await loaded(database_url, path, replace=True)
    async with running_auth(tmp_path, database_url) as auth:
        watch = auth.stub.WatchRevocations(pb.WatchRevocationsRequest(after_sequence=number))
        assert (await watch.read()).position.resync
        watch.cancel()


async def test_database_that_holds_something_is_not_touched(
    tmp_path: Path, database_url: str
) -> None:
    path = tmp_path / "auth.backup"
    async with running_auth(tmp_path, database_url) as auth:
        await fill(auth, 2)
        await saved(database_url, path)
        before = await contents(database_url)
        with pytest.raises(ConfigError, match=r"holds 1 tenants and 2 usage rows; --replace"):
            await loaded(database_url, path)
        after = await contents(database_url)
        assert all(after[name] == before[name] for name in before.keys() - {"counters"})


def rewritten(path: Path, change: Any) -> Path:
    """The file with other lines."""
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    other = path.with_name(f"changed-{change.__name__}")
    other.write_bytes(gzip.compress(b"".join(change(lines))))
    return other


def without_end(lines: list[bytes]) -> list[bytes]:
    return lines[:-1]


def without_row(lines: list[bytes]) -> list[bytes]:
    return [*lines[:5], *lines[6:]]


def newer(lines: list[bytes]) -> list[bytes]:
    return [lines[0].replace(b'"0003"', b'"9999"'), *lines[1:]]


async def test_file_that_is_not_whole_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    url, path = f"sqlite:///{tmp_path / 'auth.sqlite3'}", tmp_path / "auth.backup"
    async with running_auth(tmp_path, url) as auth:
        await fill(auth, 50)
        await saved(url, path)
    whole = path.read_bytes()
    torn, flipped, text, empty = (tmp_path / name for name in ("torn", "flip", "text", "empty"))
    torn.write_bytes(whole[: len(whole) // 2])
    flipped.write_bytes(whole[:400] + bytes([whole[400] ^ 1]) + whole[401:])
    text.write_text("hello")
    empty.write_bytes(b"")
    for file, words in (
        (torn, "torn"),
        (flipped, "altered"),
        (text, "no backup"),
        (empty, "no backup"),
        (rewritten(path, without_end), "torn: its end is missing"),
        (rewritten(path, without_row), "altered: its checksum"),
        (rewritten(path, newer), "schema 9999, which a later version"),
    ):
        fresh = f"sqlite:///{tmp_path / 'fresh.sqlite3'}"
        with pytest.raises(ConfigError, match=words) as caught:
            await loaded(fresh, file)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "fresh.sqlite3").stat().st_size


def test_column_that_is_unknown_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "auth.backup"
    with Writer(path, "0003") as writer:
        writer.rows("prices", [{"since_unix_ms": 1, "currency": "EUR", "texts": [], "more": 1}])
        writer.finish()
    url = f"sqlite:///{tmp_path / 'auth.sqlite3'}"
    with pytest.raises(ConfigError, match=r"column prices\.more, which is unknown"):
        asyncio.run(loaded(url, path))


async def send(process: AuthChild, start: int, count: int) -> tuple[int, int]:
    """Rows that were new and rows that were there."""
    async with rpc.channel(process.address) as channel:
        stub: Any = AuthServiceStub(channel)
        answer = await stub.RecordUsage(records(start, count), timeout=20)
        return answer.num_stored, answer.num_duplicates


async def test_ledger_is_whole_again_after_a_disaster_and_the_spools(tmp_path: Path) -> None:
    _, key = api_key.draw()
    (tmp_path / "key").write_text(key)
    process = AuthChild(tmp_path)
    try:
        process.start()
        await send(process, 0, 1000)
        sent = 1000

        async def load() -> None:
            nonlocal sent
            while True:
                await send(process, sent, 20)
                sent += 20

        loading = asyncio.create_task(load())
        path = tmp_path / "auth.backup"
        await asyncio.to_thread(process.run, "backup", str(path))
        loading.cancel()
        await asyncio.wait([loading])
        process.kill()
        process.wipe()
        await asyncio.to_thread(process.run, "restore", str(path))
        num_saved = len((await contents(process.url))["usage"])
        assert 1000 <= num_saved <= sent + 20
        process.start()
        async with rpc.channel(process.address) as channel:
            stub: Any = AuthServiceStub(channel)
            answer = await stub.Authenticate(pb.AuthenticateRequest(api_key=key), timeout=20)
            assert answer.principal.key_id
        # what gateways still have is sent again, much of it for the second time
        assert await send(process, 0, sent + 20) == (sent + 20 - num_saved, num_saved)
    finally:
        process.kill()
    ids = [row[0] for row in (await contents(process.url))["usage"]]
    assert len(set(ids)) == len(ids) == sent + 20


def test_commands_say_what_is_wrong_in_one_sentence(tmp_path: Path) -> None:
    environment = {**os.environ, "INFERMESH_AUTH__DATABASE_URL": f"sqlite:///{tmp_path / 'no.db'}"}
    for module, words, said in (
        ("backup", [str(tmp_path / "file")], "has schema none"),
        ("restore", [str(tmp_path / "missing")], "No such file"),
        ("restore", [], "usage: python -m"),
    ):
        command = [sys.executable, "-m", f"services.auth.{module}", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
