"""A log line about one request names it, and its trace where it has one."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infermesh.config import SchedulerConfig
from infermesh.errors import Internal, ModelLoading
from infermesh.telemetry import tracing
from infermesh.telemetry.logs import JsonFormatter
from infermesh.v1 import semantic_cache_service_pb2 as cache_pb
from services.cache.domain import Mark
from services.cache.session import LookupSession
from services.scheduler.replica import Replica
from services.shard.containment import ContainedEngine
from services.shard.domain import Sampling
from services.shard.engine import Computed, Draw
from services.shard.slots import ActiveRow
from tests.model_shard import ModelShard
from tests.unit.scheduler.desk import Desk, Listener, submission
from tests.unit.shard.rows import active_row

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
def exporting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Spans of this process go to a file."""
    monkeypatch.setattr(tracing, "_tracer", None)
    monkeypatch.setattr(tracing, "_provider", None)
    tracing.setup("test", "", str(tmp_path / "spans.jsonl"))
    yield
    tracing.shutdown()


def as_json(record: logging.LogRecord) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(JsonFormatter("test").format(record))
    assert "traceparent" not in line
    return line


def line_of(caplog: pytest.LogCaptureFixture, message: str) -> dict[str, Any]:
    """The only one that says this."""
    (record,) = [one for one in caplog.records if one.getMessage() == message]
    return as_json(record)


@pytest.mark.usefixtures("exporting")
@pytest.mark.parametrize("traceparent", ["", "letters", f"00-{'0' * 32}-b7ad6b7169203331-01"])
def test_line_has_no_trace_id_when_its_request_has_none(traceparent: str) -> None:
    record = logging.makeLogRecord({"traceparent": traceparent})
    assert "trace_id" not in as_json(record)


def test_line_has_no_trace_id_when_nothing_is_exported() -> None:
    assert "trace_id" not in as_json(logging.makeLogRecord({"traceparent": TRACEPARENT}))


@pytest.mark.usefixtures("exporting")
def test_line_has_the_trace_id_of_its_request_when_another_span_is_current() -> None:
    with tracing.span("other"):
        assert as_json(logging.makeLogRecord({"traceparent": TRACEPARENT}))["trace_id"] == TRACE
        other = tracing.current_traceparent().split("-")[1]
        assert as_json(logging.makeLogRecord({}))["trace_id"] == other


@pytest.mark.usefixtures("exporting")
def test_scheduler_names_a_request_and_its_trace_once_when_it_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    desk = Desk(ModelShard())
    request = desk.submit(1, [2, 3, 4], n=2, remaining_s=5.0, traceparent=TRACEPARENT)
    desk.now_s = 6.0
    desk.batcher.expire()
    desk.batcher.roster.fail(request, Internal("its other choice failed in the same step"))
    line = line_of(caplog, "request failed")
    named = line["request_id"], line["trace_id"], line["error"]
    assert named == ("request-1", TRACE, "deadline_exceeded")


@pytest.mark.usefixtures("exporting")
def test_scheduler_names_a_request_and_its_trace_when_it_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ModelLoading):
        Replica(SchedulerConfig()).submit(
            submission(1, [2, 3, 4], traceparent=TRACEPARENT), Listener()
        )
    line = line_of(caplog, "request refused")
    named = line["request_id"], line["trace_id"], line["error"]
    assert named == ("request-1", TRACE, "model_loading")


class Device:
    """Raises for the token 7."""

    def copy_blocks(self, pairs: Any) -> None:
        raise AssertionError("no step of these tests copies")

    def compute(self, rows: Sequence[ActiveRow], block_tables: Any) -> Computed:
        if any(7 in row.token_ids for row in rows):
            raise RuntimeError("rehearsed")
        return Computed([Draw(1) for _ in rows])


@pytest.mark.usefixtures("exporting")
def test_shard_names_the_trace_when_a_rows_computation_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad, other = TRACEPARENT, TRACEPARENT.replace("0af7", "1111")
    rows = [
        active_row(Sampling(), slot=slot, token_ids=(token,), traceparent=traceparent)
        for slot, (token, traceparent) in enumerate([(5, other), (7, bad), (6, "")])
    ]
    ContainedEngine(Device()).compute(rows, np.zeros((3, 1), dtype=np.int64))
    assert line_of(caplog, "a row's computation failed")["trace_id"] == TRACE


class FailingLookups:
    """Has nothing at once, and a defect."""

    mark = Mark(bytes(16), 0)

    def at_once(self, query: Any) -> None:
        return None

    async def by_meaning(self, query: Any) -> Any:
        raise RuntimeError("rehearsed")


@pytest.mark.usefixtures("exporting")
async def test_cache_names_a_request_and_its_trace_when_a_lookup_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    query = cache_pb.Query(
        lookup_id=1,
        request_id="request-1",
        traceparent=TRACEPARENT,
        exact_fingerprint=bytes(32),
        compatibility_fingerprint=bytes(32),
    )

    async def messages() -> AsyncIterator[cache_pb.LookupRequest]:
        yield cache_pb.LookupRequest(query=query)

    lookups: Any = FailingLookups()
    async with asyncio.TaskGroup() as tasks:
        await LookupSession(lookups, tasks).read(messages())
    line = line_of(caplog, "a lookup failed")
    assert (line["request_id"], line["trace_id"]) == ("request-1", TRACE)
