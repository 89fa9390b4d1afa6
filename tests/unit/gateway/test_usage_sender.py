"""Which records a refusing ledger gets, which are given up, and that none is dropped or held up."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.auth import usage_sender
from gateway.auth.instances import Picker
from gateway.auth.refusals import FINAL_REFUSALS, Refusals
from gateway.auth.usage import Spool
from gateway.auth.usage_sender import UsageSender
from infermesh.v1 import auth_service_pb2 as pb
from tests.unit.gateway.test_usage_spool import row

INTERNAL, INVALID = grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT


class Ledger:
    """Takes calls whole or not at all; `refuse` names the status that a record causes."""

    def __init__(self, refuse: Callable[[int], grpc.StatusCode | None]) -> None:
        self.refuse = refuse
        self.rows: set[str] = set()
        self.num_calls = 0

    async def RecordUsage(
        self, requests: AsyncIterator[pb.RecordUsageRequest], timeout: float
    ) -> pb.RecordUsageResponse:
        self.num_calls += 1
        records = [request.record.record_id async for request in requests]
        for record in records:
            code = self.refuse(int(record))
            if code is not None:
                metadata: Any = grpc.aio.Metadata()
                raise grpc.aio.AioRpcError(code, metadata, metadata, "no")
        self.rows |= set(records)
        return pb.RecordUsageResponse()


def spooled(folder: Path, count: int) -> Spool:
    spool = Spool(folder)
    for number in range(count):
        spool.append(row(number))
    return spool


def quarantined(folder: Path) -> list[str]:
    """Ids in the files beside the spool, which are read as a spool is."""
    found = []
    for file in folder.glob("*.refused"):
        found += [line.split(b'"record_id":"')[1].split(b'"')[0].decode()
                  for line in file.read_bytes().splitlines()]  # fmt: skip
    return sorted(found)


def left(spool: Spool) -> list[str]:
    found = []
    for segment in spool.segments():
        found += [one["record_id"] for one in segment.rows()]
        segment.release()
    return found


async def test_all_but_the_bad_record_arrive_at_once_and_it_is_quarantined_after_a_while(
    tmp_path: Path,
) -> None:
    spool = spooled(tmp_path, 100)
    ledger = Ledger(lambda number: INTERNAL if number == 37 else None)
    sender = UsageSender(Picker([ledger]), spool)  # type: ignore[arg-type]
    assert not await sender.flush()
    assert ledger.rows == {str(number) for number in range(100) if number != 37}
    assert left(spool) == ["37"]
    for _ in range(FINAL_REFUSALS - 2):
        assert not await sender.flush()
        assert quarantined(tmp_path) == []
    assert await sender.flush()
    assert quarantined(tmp_path) == ["37"]
    assert left(spool) == []
    spool.close()


async def test_a_record_that_is_invalid_is_quarantined_at_once(tmp_path: Path) -> None:
    spool = spooled(tmp_path, 9)
    ledger = Ledger(lambda number: INVALID if number in (0, 8) else None)
    assert await UsageSender(Picker([ledger]), spool).flush()  # type: ignore[arg-type]
    assert quarantined(tmp_path) == ["0", "8"]
    assert len(ledger.rows) == 7
    spool.close()


async def test_no_record_is_to_blame_when_the_ledger_takes_none(tmp_path: Path) -> None:
    spool = spooled(tmp_path, 500)
    ledger = Ledger(lambda _: INTERNAL)
    sender = UsageSender(Picker([ledger]), spool)  # type: ignore[arg-type]
    for _ in range(3 * FINAL_REFUSALS):
        before = ledger.num_calls
        assert not await sender.flush()
        assert ledger.num_calls - before <= usage_sender._MAX_REFUSED_CALLS
    assert quarantined(tmp_path) == []
    assert sorted(left(spool), key=int) == [str(number) for number in range(500)]
    ledger.refuse = lambda _: None
    assert await sender.flush()
    assert len(ledger.rows) == 500
    spool.close()


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED])
async def test_what_hinders_the_whole_ledger_is_waited_out(
    tmp_path: Path, code: grpc.StatusCode
) -> None:
    spool = spooled(tmp_path, 9)
    ledger = Ledger(lambda _: code)
    sender = UsageSender(Picker([ledger]), spool)  # type: ignore[arg-type]
    for _ in range(2 * FINAL_REFUSALS):
        with pytest.raises(grpc.aio.AioRpcError):
            await sender.flush()
    assert ledger.num_calls == 2 * FINAL_REFUSALS, "there is nothing to halve"
    ledger.refuse = lambda _: None
    assert await sender.flush()
    assert len(ledger.rows) == 9
    assert quarantined(tmp_path) == []
    spool.close()


@settings(max_examples=30, deadline=None)  # each writes files
@given(bad=st.sets(st.integers(0, 39), max_size=6))
async def test_every_record_is_taken_or_quarantined(
    tmp_path_factory: pytest.TempPathFactory, bad: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    spool = spooled(folder, 40)
    ledger = Ledger(lambda number: INTERNAL if number in bad else None)
    sender = UsageSender(Picker([ledger]), spool)  # type: ignore[arg-type]
    for _ in range(FINAL_REFUSALS):
        await sender.flush()
    assert sorted(map(int, quarantined(folder))) == sorted(bad)
    assert ledger.rows == {str(number) for number in range(40) if number not in bad}
    assert left(spool) == []
    spool.close()


def test_a_record_alone_in_its_spool_is_given_up_once_the_ledger_has_taken_another() -> None:
    refusals = Refusals()
    for _ in range(3 * FINAL_REFUSALS):
        refusals.begin_round()
        assert not refusals.refused_alone("bad")
    refusals.begin_round()
    refusals.took(1)
    assert refusals.has_progressed
    assert refusals.refused_alone("bad")
