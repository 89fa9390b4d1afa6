"""What the previous version left on the disk is read by this one: tests/skew/samples."""

import shutil
import sqlite3
from pathlib import Path

from gateway.auth.translate import usage_to_pb
from gateway.auth.usage import Spool
from infermesh.v1 import auth_service_pb2 as pb
from services.auth.migrate import revisions
from services.cache.recovery import recover
from tests.auth_process import running_auth
from tests.skew.freeze import SAMPLES
from tests.skew.write_samples import KEY, ROW


async def test_auth_serves_the_previous_database(tmp_path: Path) -> None:
    file = tmp_path / "auth.sqlite3"
    with sqlite3.connect(file) as connection:
        connection.executescript((SAMPLES / "auth.sql").read_text())
    async with running_auth(tmp_path, f"sqlite:///{file}") as auth:
        answer = await auth.stub.Authenticate(pb.AuthenticateRequest(api_key=KEY))
        (total,) = await auth.usage("local")
        assert answer.principal.key_id == ROW["key_id"]
        assert (total.num_requests, total.prompt_tokens) == (1, ROW["prompt_tokens"])
    with sqlite3.connect(file) as connection:
        (schema,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    connection.close()
    assert schema == revisions()[-1]


def test_gateway_sends_the_previous_spool(tmp_path: Path) -> None:
    shutil.copytree(SAMPLES / "usage", tmp_path / "usage")
    (segment,) = [s for s in Spool(tmp_path / "usage").segments() if s.rows()]
    (row,) = segment.rows()
    assert usage_to_pb(row).record == pb.UsageRecord(**ROW)


def test_gateway_leaves_out_of_a_spool_what_a_later_version_knows() -> None:
    later = {**ROW, "device_seconds": 0.5}
    assert usage_to_pb(later).record == pb.UsageRecord(**ROW)  # type: ignore[arg-type]  # as read


def test_cache_recovers_the_previous_snapshot_and_log(tmp_path: Path) -> None:
    shutil.copytree(SAMPLES / "cache", tmp_path / "cache")
    found = recover(tmp_path / "cache")
    assert sorted(found.kept) == [2, 3]
    assert found.kept[2].text == "question 2"
    assert list(found.vectors) == [2]
    assert {one.id for one in found.quarantined} == {1}
    assert found.num_corrupt == 0


def test_cache_keeps_aside_a_file_of_a_later_format(tmp_path: Path) -> None:
    shutil.copytree(SAMPLES / "cache", tmp_path / "cache")
    log = tmp_path / "cache" / "000001.log"
    later = bytearray(log.read_bytes())
    half = len(b"IMCACHE") + 1 + 16 + 4
    later[7] = later[7 + half] = 2  # the version, in both copies of the header
    log.write_bytes(later)
    found = recover(tmp_path / "cache")
    assert sorted(found.kept) == [1, 2]  # of the snapshot
    assert log.with_name("000001.log.damaged").read_bytes() == later
