"""Whatever a later version answers, nobody crashes: each reader takes it, or refuses it by name."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.auth.instances import Picker
from gateway.auth.principals import PrincipalCache, digest
from gateway.auth.translate import grant_from_pb, principal_from_pb
from gateway.auth.usage import Spool, UsageRow
from gateway.auth.usage_sender import UsageSender
from gateway.auth.verifier import Verifier
from gateway.cache.client import CacheClient, EmbedderState
from gateway.cache.translate import verdict_from_pb
from gateway.cache.verdict import Outcome
from gateway.replica.manifest import fetch_model
from gateway.replica.session import Session, StreamId
from gateway.replica.translate import finish_from_pb
from gateway.replica.view import ReplicaState, block_events_from_pb, view_from_pb
from gateway.tokens import Finish
from infermesh import Client, rpc_status
from infermesh.config import SchedulerConfig
from infermesh.errors import (
    IncompatibleVersion,
    Internal,
    MeshError,
    QueueFull,
    Unavailable,
    from_detail,
    from_rpc_error,
)
from infermesh.v1 import auth_admin_service_pb2 as auth_admin_pb
from infermesh.v1 import auth_service_pb2 as auth_pb
from infermesh.v1 import errors_pb2, sampling_pb2
from infermesh.v1 import inference_service_pb2 as inference_pb
from infermesh.v1 import scheduler_service_pb2 as scheduler_pb
from infermesh.v1 import semantic_cache_admin_service_pb2 as cache_admin_pb
from infermesh.v1 import semantic_cache_service_pb2 as cache_pb
from infermesh.v1 import shard_service_pb2 as shard_pb
from services.scheduler.shard_link import ShardLink
from tests.skew.newer import UNKNOWN_ENUM, has_choices, messages

ROW: UsageRow = {
    "record_id": "r", "request_id": "q", "tenant_id": "t", "key_id": "k", "model": "m",
    "endpoint": "chat", "status": "ok", "prompt_tokens": 1, "completion_tokens": 2,
    "cached_prompt_tokens": 0, "finished_unix_ms": 3,
}  # fmt: skip


class Stub:
    """Answers every call with one message, unary or as a stream of it."""

    def __init__(self, message: Any) -> None:
        self._message = message

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_, **__: Call(self._message)


class Call:
    """One message, however it is asked for."""

    def __init__(self, message: Any) -> None:
        self._message = message

    def __await__(self) -> Iterator[Any]:
        yield from asyncio.sleep(0).__await__()
        return self._message

    def __iter__(self) -> Iterator[Any]:
        yield self._message

    async def __aiter__(self) -> AsyncIterator[Any]:
        yield self._message

    def __getattr__(self, name: str) -> Any:  # a unary answer of a synchronous stub
        return getattr(self._message, name)

    async def read(self) -> Any:
        return self._message

    async def write(self, message: Any) -> None: ...

    def cancel(self) -> None: ...


async def read_session(message: Any) -> None:
    session = Session(lambda requests: Call(message))
    session._sinks.update({StreamId(number): mock.Mock() for number in range(4)})
    await session.run(lambda: None)


async def read_change(message: Any) -> None:
    cache = PrincipalCache(60.0, 60.0, lambda: 0.0)
    Verifier(mock.Mock(), cache, lambda tenant: None)._see(message)


async def read_embedder(message: Any) -> None:
    client = CacheClient("unix:/nowhere", lambda: 0.0)
    await client._describe(Stub(message))  # type: ignore[arg-type]  # it answers as one
    assert isinstance(client.embedder.state, EmbedderState)


async def read_lookup(message: Any) -> None:
    verdict = verdict_from_pb(message)
    assert verdict.is_hit is (verdict.outcome is Outcome.HIT)
    assert verdict.answer is None or verdict.answer.choices


async def read_report(message: Any) -> None:
    view_from_pb(message)
    block_events_from_pb(message.blocks)


async def read_model(message: Any) -> None:
    with ThreadPoolExecutor(1) as threads:
        await fetch_model(Stub(message), threads)  # type: ignore[arg-type]  # it answers as one


async def read_grants(message: Any) -> None:
    for grant in message.grants:
        grant_from_pb(grant)


def link_to(message: Any) -> ShardLink:
    link = ShardLink("unix:/nowhere", SchedulerConfig(model="any"))
    link._stub = Stub(message)
    return link


async def read_description(message: Any) -> None:
    await link_to(message).describe()


async def read_load(message: Any) -> None:
    await link_to(message).load(lambda stage, done: None)


async def read_step(message: Any) -> None:
    async with link_to(message).open(1, 2) as stream:
        await anext(stream.results())


def as_client(ask: Callable[[Client], Any]) -> Callable[[Any], Any]:
    async def read(message: Any) -> None:
        with Client() as client:
            client._stub = Stub(message)
            ask(client)

    return read


READERS: dict[str, Callable[[Any], Any]] = {
    "AuthService.Lease": read_grants,
    "AuthService.WatchRevocations": read_change,
    "InferenceService.Chat": as_client(lambda client: list(client.chat("hi", model="m"))),
    "InferenceService.Generate": as_client(lambda client: list(client.generate("hi", model="m"))),
    "InferenceService.ListModels": as_client(lambda client: client.models()),
    "SchedulerService.GetModel": read_model,
    "SchedulerService.Session": read_session,
    "SchedulerService.WatchReplica": read_report,
    "SemanticCacheService.GetEmbedder": read_embedder,
    "SemanticCacheService.Lookup": read_lookup,
    "ShardService.Describe": read_description,
    "ShardService.Execute": read_step,
    "ShardService.Load": read_load,
}
# Nothing of ours reads these answers.
UNREAD = {
    "InferenceService.GetModel",
    "SemanticCacheAdminService.GetStats",
    "SemanticCacheService.Store",
}


SERVICES = (
    auth_admin_pb, auth_pb, inference_pb, cache_admin_pb, cache_pb, scheduler_pb, shard_pb,
)  # fmt: skip


def every_rpc() -> dict[str, MethodDescriptor]:
    services = [s for file in SERVICES for s in file.DESCRIPTOR.services_by_name.values()]
    return {f"{s.name}.{method.name}": method for s in services for method in s.methods}


def test_every_answer_that_a_later_version_may_widen_has_a_reader_here() -> None:
    widened = {name for name, rpc in every_rpc().items() if has_choices(rpc.output_type)}
    assert widened == set(READERS) | UNREAD


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
async def test_reader_takes_or_refuses_by_name_what_a_later_version_answers(
    name: str, data: st.DataObject
) -> None:
    message = data.draw(messages(every_rpc()[name].output_type))
    with suppress(MeshError):
        await READERS[name](message)


def test_reason_that_is_not_known_yet_is_read_by_its_status() -> None:
    detail = errors_pb2.ErrorDetail(reason=UNKNOWN_ENUM, message="a new kind of full")
    trailer = grpc.aio.Metadata(("infermesh-error-bin", detail.SerializeToString()))
    for code, known in (("RESOURCE_EXHAUSTED", QueueFull), ("UNAVAILABLE", Unavailable)):
        failed = grpc.aio.AioRpcError(grpc.StatusCode[code], grpc.aio.Metadata(), trailer)
        error = from_rpc_error(failed)
        assert isinstance(error, known)
        assert error.message == "a new kind of full"
    assert type(from_detail(detail)) is Internal


def test_finish_reason_that_is_not_known_yet_ends_the_choice() -> None:
    known = finish_from_pb(scheduler_pb.Finished(reason=sampling_pb2.FINISH_REASON_STOP))
    assert isinstance(known, Finish)
    assert isinstance(finish_from_pb(scheduler_pb.Finished(reason=UNKNOWN_ENUM)), Internal)
    delta = inference_pb.ChoiceDelta(finish_reason=UNKNOWN_ENUM)
    with Client() as client:
        client._stub = Stub(inference_pb.ChatResponse(choices=[delta]))
        assert [one.finish_reason for one in client.chat("hi", model="m")] == ["other"]


def test_lookup_that_ends_in_an_unknown_way_is_a_miss() -> None:
    verdict = verdict_from_pb(cache_pb.LookupResponse(outcome=UNKNOWN_ENUM, reason=UNKNOWN_ENUM))
    assert (verdict.outcome, verdict.reason) == (Outcome.MISS, "other")


def test_replica_in_an_unknown_state_gets_no_request() -> None:
    view = view_from_pb(scheduler_pb.WatchReplicaResponse(state=UNKNOWN_ENUM))
    assert view.state is ReplicaState.UNREACHABLE


def test_change_of_an_unknown_kind_drops_every_principal() -> None:
    cache = PrincipalCache(60.0, 60.0, lambda: 0.0)
    key, principal = digest("key"), principal_from_pb(auth_pb.Principal(tenant_id="t"))
    cache.put(key, principal, None, 1)
    verifier = Verifier(mock.Mock(), cache, lambda tenant: None)
    verifier._see(auth_pb.WatchRevocationsResponse(sequence=2, heartbeat=auth_pb.WatchHeartbeat()))
    assert cache.fresh(key) is principal
    verifier._see(auth_pb.WatchRevocationsResponse(sequence=3))
    assert cache.fresh(key) is None


async def test_ledger_that_refuses_the_version_is_waited_for_and_no_record_given_up(
    tmp_path: Path,
) -> None:
    refusal = IncompatibleVersion("upgrade the caller first")
    trailer = grpc.aio.Metadata(*rpc_status.trailers(refusal))
    spool = Spool(tmp_path)
    spool.append(ROW)
    failed = grpc.aio.AioRpcError(refusal.grpc_code, grpc.aio.Metadata(), trailer)
    stub = mock.Mock(RecordUsage=mock.AsyncMock(side_effect=failed))
    for _ in range(3):
        with pytest.raises(grpc.aio.AioRpcError):
            await UsageSender(Picker([stub]), spool).flush()
    spool.close()
    assert [row for segment in spool.segments() for row in segment.rows()] == [ROW]
