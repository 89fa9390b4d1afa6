"""An auth database that can be read but not written for a while: what goes on, what waits, what is
refused, and that the ledger is whole afterwards. Old usage in it, and its backup elsewhere.
"""

import contextlib
import json
import resource
import sqlite3
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest

from infermesh.v1 import auth_service_pb2 as pb
from infermesh.v1.auth_service_pb2_grpc import AuthServiceStub
from tests.auth_child import AuthChild
from tests.e2e.mesh_process import Mesh, run_infermesh, wait_until
from tests.e2e.test_auth import (
    LIGHT,
    ask,
    assert_billed,
    command,
    make_tenant,
    rows_of,
    usage_of,
)

LIMIT = ("--tokens-per-minute", "100000")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    with Mesh(folder, *LIGHT, "--set", "auth.ledger_retention_days=1") as running:
        yield running


@contextlib.contextmanager
def locked(mesh: Mesh) -> Iterator[None]:
    """Another process holds the lock for writing, as a copy or a repair does."""
    path = mesh.tmp_path / "state" / "infermesh" / "auth.sqlite3"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@contextlib.contextmanager
def unwritable(mesh: Mesh) -> Iterator[None]:
    """The system refuses every write to a file of the service, as a file system does that went
    read-only under it; permissions of a file that is open already would change nothing.
    """
    pid = mesh.service("auth")["pid"]
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


def refused(mesh: Mesh, api_key: str) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(mesh, api_key)
    return caught.value


@pytest.mark.parametrize("hindrance", [pytest.param(locked, marks=pytest.mark.slow), unwritable])
def test_requests_go_on_within_leases_and_no_row_is_lost_when_the_database_cannot_be_written(
    mesh: Mesh, hindrance: Callable[[Mesh], contextlib.AbstractContextManager[None]]
) -> None:
    tenant, free = hindrance.__name__, f"{hindrance.__name__}-free"
    key, unlimited = make_tenant(mesh, tenant, *LIMIT), make_tenant(mesh, free)
    newcomer = make_tenant(mesh, f"{tenant}-new", *LIMIT)
    answered: dict[str, int] = {}

    def answer(count: int, max_tokens: int = 8) -> None:
        for _ in range(count):
            request_id = f"{tenant}-{len(answered)}"
            headers = {"x-request-id": request_id}
            reply = ask(mesh, key, max_tokens=max_tokens, extra_headers=headers)
            answered[request_id] = reply.usage.total_tokens

    def use_up() -> openai.APIStatusError:
        with pytest.raises(openai.APIStatusError) as caught:
            answer(100, max_tokens=200)
        return caught.value

    answer(4)
    usage_of(mesh, tenant, 4)
    answer(4)  # at work, so that its lease is filled ahead
    with hindrance(mesh), ThreadPoolExecutor() as threads:
        answer(3)
        creating = threads.submit(run_infermesh, mesh.tmp_path, "keys", "create", "--tenant", free)
        beyond = threads.submit(use_up)
        without_lease = threads.submit(refused, mesh, newcomer)
        ask(mesh, unlimited)  # what only has to be read is answered, though never seen before
        assert refused(mesh, unlimited[:-4] + "aaaa").status_code == 401
        for error in (beyond.result(), without_lease.result()):
            assert (error.status_code, error.code) == (503, "auth_unavailable")
            assert int(error.response.headers["retry-after"]) >= 1
        assert_says_why(creating.result())
        assert len(rows_of(mesh, tenant)) <= 8, "the database was written"
        assert rows_of(mesh, free) == []
    assert_billed(mesh, tenant, answered, set())
    assert sum(row["requests"] for row in usage_of(mesh, free, 1)) == 1
    ask(mesh, newcomer)
    command(mesh, "keys", "create", "--tenant", free)


def test_a_record_that_the_ledger_cannot_store_holds_up_no_other(mesh: Mesh) -> None:
    """More tokens than a column holds, in a segment of a gateway that was killed."""
    before = mesh.metric("gateway", "usage_records_quarantined_total")
    records = {"first": 7, "bad": 1 << 63, "last": 8}
    rows = [
        {"record_id": name, "request_id": name, "tenant_id": "left", "prompt_tokens": tokens}
        for name, tokens in records.items()
    ]
    segment, lines = leave(mesh, rows)
    wait_until(lambda: len(rows_of(mesh, "left")) == 2, 30, "the others are in the ledger")
    ask(mesh, make_tenant(mesh, "beside"))
    usage_of(mesh, "beside", 1)
    quarantine = segment.with_name(f"{segment.name}.refused")
    wait_until(quarantine.exists, 30, "the record is kept aside")
    wait_until(lambda: not segment.exists(), 10, "nothing of the segment is left")
    assert quarantine.read_bytes() == lines[1]
    assert mesh.metric("gateway", "usage_records_quarantined_total") == before + 1
    assert '"record_id": "bad"' in mesh.logs()
    assert rows_of(mesh, "left") == [("first", 7), ("last", 8)]


def leave(mesh: Mesh, rows: list[dict[str, Any]]) -> tuple[Path, list[bytes]]:
    """A segment and its lines, as a gateway that was killed leaves it."""
    spool = mesh.tmp_path / "state" / "infermesh" / "usage"
    bodies = [json.dumps(row, separators=(",", ":")).encode() for row in rows]
    lines = [b"%08x %b\n" % (zlib.crc32(body), body) for body in bodies]
    draft = spool / "draft"
    draft.write_bytes(b"".join(lines))
    return draft.rename(spool / f"{1:020}-1-1.usage"), lines


def test_old_days_are_rolled_up_and_a_backup_of_them_is_served_elsewhere(
    mesh: Mesh, tmp_path: Path
) -> None:
    days_ago = [5, 5, 3, 0]
    now_ms = int(time.time() * 1000)
    rows = [
        {
            "record_id": f"old-{number}",
            "request_id": f"old-{number}",
            "tenant_id": "old",
            "model": mesh.model,
            "end_user": "ann",
            "prompt_tokens": 10**number,
            "finished_unix_ms": now_ms - days * 86_400_000,
        }
        for number, days in enumerate(days_ago)
    ]
    leave(mesh, rows)
    wait_until(lambda: len(rows_of(mesh, "old")) == 4, 30, "the ledger has the rows")
    query = ("usage", "--tenant", "old", "--by", "day", "--by", "user", "--json")
    before = json.loads(command(mesh, *query))
    assert [row["prompt_tokens"] for row in before] == [11, 100, 1000]

    mesh.wait_restarted("auth", mesh.kill("auth"))  # it rolls up as it starts
    wait_until(lambda: rows_of(mesh, "old") == [("old-3", 1000)], 30, "the old ones are gone")
    wait_until(lambda: mesh.metric("auth", "ledger_rows_rolled_up_total") >= 3, 10)
    wait_until(lambda: '"usage rolled up"' in mesh.logs(), 10)
    assert json.loads(command(mesh, *query)) == before

    file, state = tmp_path / "auth.gz", tmp_path / "state" / "infermesh"
    command(mesh, "auth", "backup", str(file))
    done = run_infermesh(tmp_path, "auth", "restore", str(file))
    assert done.returncode == 0, done.stderr
    with AuthChild(tmp_path, f"sqlite:///{state / 'auth.sqlite3'}") as other:
        there = ("--admin", other.admin_address)
        assert json.loads(command(mesh, *query, *there)) == before
        with grpc.insecure_channel(other.address) as channel:
            stub = AuthServiceStub(channel)
            answer = stub.Authenticate(
                pb.AuthenticateRequest(api_key=mesh.facts["api_key"]), timeout=10
            )
    assert answer.principal.tenant_id == "local"


def assert_says_why(done: subprocess.CompletedProcess[str]) -> None:
    """One sentence that names the database, and a non-zero exit status."""
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert "auth.sqlite3 can't be used" in line
