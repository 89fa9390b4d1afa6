"""A database of any age becomes this version's; what can't be used says so in one sentence."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.ext.asyncio import AsyncConnection

from infermesh.config import ConfigError
from infermesh.errors import AuthUnavailable, from_rpc_error
from infermesh.v1 import auth_admin_service_pb2 as admin_pb
from infermesh.v1 import auth_service_pb2 as pb
from services.auth import api_key
from services.auth.database import Database
from services.auth.migrate import migrate, revisions
from services.auth.schema import counters, keys, metadata, tenants
from tests.auth_process import running_auth
from tests.postgres import Postgres, running_postgres

ACME = {
    "id": "acme",
    "name": "Acme",
    "tokens_per_minute": 100,
    "weight": 1.0,
    "semantic_cache": False,
    "reuse_policy": "",
    "created_at": 1,
}


def differences(connection: sa.Connection) -> list[Any]:
    found: list[Any] = compare_metadata(MigrationContext.configure(connection), metadata)
    return found


async def test_empty_database_gets_the_tables_of_this_version(database_url: str) -> None:
    database = Database(database_url)
    await migrate(database)
    async with database.reading() as connection:
        assert await connection.run_sync(differences) == []
    await database.close()


async def test_data_of_the_first_version_goes_on(database_url: str, tmp_path: Path) -> None:
    database = Database(database_url)
    await migrate(database, revisions()[0])
    key_id, text = api_key.draw()
    key = {
        "id": key_id,
        "tenant_id": "acme",
        "name": "old",
        "hash": api_key.hashed(text),
        "scopes": ["inference"],
        "models": [],
        "created_at": 1,
    }
    async with database.writing() as connection:
        await connection.execute(sa.insert(tenants).values(**ACME))
        await connection.execute(sa.insert(keys).values(**key))
    await database.close()
    async with running_auth(tmp_path, database_url) as auth:
        answer = await auth.stub.Authenticate(pb.AuthenticateRequest(api_key=text))
        assert answer.principal.limits.tokens_per_minute == 100
        lease = auth.stub.Lease()
        hello = pb.LeaseHello(gateway_id="g", incarnation="1")
        await lease.write(pb.LeaseRequest(hello=hello))
        need = pb.QuotaAmounts(tokens=500)
        state = pb.LeaseState(lease_id="l", tenant_id="acme", needed=need, least_needed=need)
        await lease.write(pb.LeaseRequest(report=pb.LeaseReport(leases=[state])))
        assert (await lease.read()).grants[0].granted.tokens == 100
        lease.cancel()


async def test_processes_that_start_at_once_migrate_once(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(4)]
    await asyncio.gather(*(migrate(database) for database in databases))
    async with databases[0].reading() as connection:
        query = sa.select(counters.c.value).where(counters.c.name == "starts")
        assert (await connection.execute(query)).scalar_one() == 4
    for database in databases:
        await database.close()


async def test_newer_schema_is_refused_by_name(database_url: str) -> None:
    database = Database(database_url)
    await migrate(database)
    async with database.writing() as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
        await set_oldest_reader(connection, 9998)
    with pytest.raises(ConfigError, match=r"9999.*later version"):
        await migrate(database)
    await database.close()


async def test_newer_schema_that_has_only_added_is_served_as_it_is(
    tmp_path: Path, database_url: str
) -> None:
    database = Database(database_url)
    await migrate(database)
    async with database.writing() as connection:
        await connection.execute(sa.text("ALTER TABLE keys ADD COLUMN colour VARCHAR(8)"))
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
        await set_oldest_reader(connection, int(revisions()[-1]))
    await database.close()
    async with running_auth(tmp_path, database_url) as auth:
        tenant = admin_pb.CreateTenantRequest(id="acme", name="Acme")
        await auth.admin.CreateTenant(tenant)
        made = await auth.admin.CreateKey(admin_pb.CreateKeyRequest(tenant_id="acme", name="k"))
        answer = await auth.stub.Authenticate(pb.AuthenticateRequest(api_key=made.api_key))
        assert answer.principal.tenant_id == "acme"


async def set_oldest_reader(connection: AsyncConnection, revision: int) -> None:
    """As the migration of a later version does."""
    row = sa.update(counters).where(counters.c.name == "oldest_reader")
    assert (await connection.execute(row.values(value=revision))).rowcount == 1


async def test_read_only_database_is_refused(
    tmp_path: Path, database_url: str, request: pytest.FixtureRequest
) -> None:
    database = Database(database_url)
    await migrate(database)
    await database.close()
    if database.is_sqlite:
        read_only_url = f"sqlite:///file:{tmp_path / 'auth.sqlite3'}?mode=ro&uri=true"
    else:
        cluster: Postgres = request.getfixturevalue("postgres")
        cluster.make_read_only(database_url)
        read_only_url = database_url
    database = Database(read_only_url)
    with pytest.raises(ConfigError, match=r"auth\.database_url: .*read-?only"):
        await migrate(database)
    await database.close()


async def test_absent_postgresql_database_is_refused_by_name(postgres: Postgres) -> None:
    url = postgres.create_database().replace("/test_", "/missing_")
    with pytest.raises(ConfigError, match=r"auth\.database_url: .*missing_.*does not exist"):
        await migrate(Database(url))


async def test_postgresql_that_comes_back_is_used_again(tmp_path: Path) -> None:
    with running_postgres() as cluster:
        async with running_auth(tmp_path, cluster.create_database()) as auth:
            await auth.tenant("acme")
            text, _ = await auth.key("acme")
            request = pb.AuthenticateRequest(api_key=text)
            await auth.stub.Authenticate(request)
            await asyncio.to_thread(cluster.stop)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await auth.stub.Authenticate(request, timeout=10)
            assert isinstance(from_rpc_error(caught.value), AuthUnavailable)
            await asyncio.to_thread(cluster.start)
            await auth.stub.Authenticate(request, timeout=10)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense", "no database URL"),
        ("mysql://localhost/x", "mysql"),
        ("postgres//u:hidden@db/auth", "no database URL"),
        ("postgres://u:hidden@/x?host=/nowhere", "No such file"),
        ("sqlite:////nowhere/at/all.sqlite3", "/nowhere/at"),
        ("postgresql://u:hidden@/x?host=/nowhere", "No such file"),
    ],
)
async def test_bad_url_is_refused_in_one_sentence(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        await migrate(Database(url))
    assert "auth.database_url" in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


def run_alone(url: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "services.auth.migrate"]
    environment = {**os.environ, "INFERMESH_AUTH__DATABASE_URL": url}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


async def test_migrating_alone_brings_the_tables_and_ends(database_url: str) -> None:
    for _ in range(2):
        done = await asyncio.to_thread(run_alone, database_url)
        assert (done.returncode, done.stderr) == (0, "")
        assert revisions()[-1] in done.stdout

    database = Database(database_url)
    async with database.reading() as connection:
        assert await connection.run_sync(differences) == []
    await database.close()


def test_migrating_alone_fails_with_one_sentence_where_the_database_is_away() -> None:
    done = run_alone("sqlite:////nowhere/auth.sqlite3")

    assert done.returncode == 1
    assert done.stderr.startswith("error: auth.database_url")
    assert done.stderr.count("\n") == 1
