"""The cache process as seen from here: connected, asked, given answers, and left alone when it is
slow. Chooses nothing.
"""

import asyncio
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import grpc

from gateway import metrics
from gateway.cache.keeper import Keeper
from gateway.cache.lookups import UNAVAILABLE, Lookups
from gateway.cache.translate import Question, entry_to_pb, query_to_pb
from gateway.cache.verdict import StoredAnswer, Verdict
from gateway.replica.client import Backoff
from infermesh import rpc
from infermesh.errors import MeshError, ReplicaUnavailable, as_mesh_error, from_rpc_error
from infermesh.security.certificates import Certificates
from infermesh.security.identities import Identity
from infermesh.telemetry import logs
from infermesh.v1 import semantic_cache_admin_service_pb2 as admin_pb
from infermesh.v1 import semantic_cache_service_pb2 as pb
from infermesh.v1.semantic_cache_admin_service_pb2_grpc import SemanticCacheAdminServiceStub
from infermesh.v1.semantic_cache_service_pb2_grpc import SemanticCacheServiceStub

if TYPE_CHECKING:  # the types of the asyncio stubs exist in the stubs alone
    from infermesh.v1.semantic_cache_admin_service_pb2_grpc import (
        SemanticCacheAdminServiceAsyncStub,
    )
    from infermesh.v1.semantic_cache_service_pb2_grpc import SemanticCacheServiceAsyncStub

_log = logs.get(__name__)
_DESCRIBE_TIMEOUT_S = 2.0
_ADMIN_TIMEOUT_S = 10.0
_LOADING_POLL_S = 0.25
_RETRY_AFTER_S = 1.0
# So many lookups in a row without an answer in time: no more for a while.
_MAX_TIMEOUTS = 3
_SUSPENDED_S = 1.0


class EmbedderState(enum.Enum):
    """What the embedder can do."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    DISABLED = "disabled"


_STATES = {
    pb.EMBEDDER_STATE_READY: EmbedderState.READY,
    pb.EMBEDDER_STATE_FAILED: EmbedderState.FAILED,
    pb.EMBEDDER_STATE_DISABLED: EmbedderState.DISABLED,
}


@dataclass(frozen=True, slots=True)
class Embedder:
    """The embedder as it describes itself; limits are 0 until it is ready."""

    state: EmbedderState
    model_id: str
    dimensions: int
    max_tokens: int
    max_texts: int


@dataclass(frozen=True, slots=True)
class Vector:
    """One embedded text."""

    values: Sequence[float]
    num_tokens: int


class CacheClient:
    """Keeps one cache usable.

    Args:
        clock: monotonic seconds.
    """

    def __init__(
        self,
        address: str,
        clock: Callable[[], float],
        certificates: Certificates | None = None,
    ) -> None:
        self.address = address
        self._certificates = certificates
        # the last description: answers found before a restart have the same keys after it
        self.embedder: Embedder | None = None
        self._clock = clock
        self._keeper = Keeper()
        self._lookups: Lookups | None = None
        self._stub: SemanticCacheServiceAsyncStub | None = None
        self._admin: SemanticCacheAdminServiceAsyncStub | None = None
        self._timeouts = 0
        self._suspended_until = 0.0
        self._changed = asyncio.Event()

    @property
    def usable(self) -> bool:
        """Lookups are answered, as far as is known."""
        return self._lookups is not None and self._clock() >= self._suspended_until

    @property
    def mark(self) -> bytes:
        """Of a generation that begins now; empty while the cache is not there."""
        return b"" if self._lookups is None else self._lookups.mark

    def lookup(self, question: Question, timeout_s: float) -> "asyncio.Future[Verdict]":
        """Asks; the verdict is there within `timeout_s`, whatever happens."""
        if self._lookups is None or not self.usable:
            nothing: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
            nothing.set_result(UNAVAILABLE)
            return nothing
        return self._lookups.ask(query_to_pb(question, timeout_s), timeout_s)

    def keep(self, question: Question, answer: StoredAnswer) -> None:
        """Gives the cache a fresh answer, when it gets to it; it would take none without a mark."""
        if question.mark:
            self._keeper.put(entry_to_pb(question, answer))
        else:
            metrics.CACHE_WRITES.labels("unmarked").inc()

    async def embed(
        self, texts: Sequence[str], request_id: str, traceparent: str, timeout_s: float
    ) -> list[Vector]:
        """Unit vectors of texts, at most `embedder.max_texts`.

        Raises:
            MeshError: the embedder can't, or a text is too long for it.
        """
        if self._stub is None:
            raise _unreachable()
        request = pb.SemanticCacheServiceEmbedRequest(
            texts=texts, request_id=request_id, traceparent=traceparent
        )
        try:
            response = await self._stub.Embed(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as exc:
            raise from_rpc_error(exc) from None
        return [Vector(found.values, found.num_tokens) for found in response.embeddings]

    async def report_bad_hit(self, entry_id: str, request_id: str) -> bool:
        """Takes an entry out of use, on an operator's word; False where it was already.

        Raises:
            NotFound: there is no such entry.
            MeshError: the cache can't be reached.
        """
        request = admin_pb.ReportBadHitRequest(entry_id=entry_id, request_id=request_id)
        if self._admin is None:
            raise _unreachable()
        try:
            response = await self._admin.ReportBadHit(request, timeout=_ADMIN_TIMEOUT_S)
        except grpc.aio.AioRpcError as exc:
            raise from_rpc_error(exc) from None
        return bool(response.newly_quarantined)

    async def invalidate(self, scope: str, value: str | bool, dry_run: bool) -> int:
        """Removes the entries of a scope of InvalidateRequest, or counts them.

        Raises:
            MeshError: the cache can't be reached, or refuses.
        """
        request = admin_pb.InvalidateRequest(dry_run=dry_run)
        setattr(request, scope, value)
        if self._admin is None:
            raise _unreachable()
        try:
            response = await self._admin.Invalidate(request, timeout=_ADMIN_TIMEOUT_S)
        except grpc.aio.AioRpcError as exc:
            raise from_rpc_error(exc) from None
        return int(response.num_entries)

    async def changed(self) -> None:
        """Returns when it was found or lost, or its embedder's state changed."""
        await self._changed.wait()

    async def run(self) -> None:
        """Connects, and connects again, until cancelled."""
        backoff = Backoff()
        async with rpc.channel(self.address, Identity.CACHE, self._certificates) as channel:
            stub = cast("SemanticCacheServiceAsyncStub", SemanticCacheServiceStub(channel))
            self._admin = cast(
                "SemanticCacheAdminServiceAsyncStub", SemanticCacheAdminServiceStub(channel)
            )
            while True:
                try:
                    await self._serve(stub, backoff)
                except* (grpc.aio.AioRpcError, MeshError) as group:
                    why = as_mesh_error(group).message
                    _log.debug("cache lost", extra={"cache": self.address, "error": why})
                except* Exception:  # a defect of ours must cost hits alone, never the gateway
                    _log.exception("the cache's connection failed")
                await backoff.wait()

    async def _serve(self, stub: "SemanticCacheServiceAsyncStub", backoff: Backoff) -> None:
        """One connection's life.

        Raises:
            ExceptionGroup: of why it ended.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                mark = await self._describe(stub)
                backoff.reset()
                _log.info("cache connected", extra={"cache": self.address})
                self._stub = stub
                self._timeouts, self._suspended_until = 0, 0.0
                lookups = Lookups(stub.Lookup, self._on_answer, mark)
                self._see(lookups)
                tasks.create_task(lookups.run())
                tasks.create_task(self._keeper.run(stub.Store))
                tasks.create_task(self._watch_loading(stub))
        finally:
            self._stub = None
            self._see(None)

    def _see(self, lookups: Lookups | None) -> None:
        self._lookups = lookups
        metrics.cache_connected().set(lookups is not None)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _watch_loading(self, stub: "SemanticCacheServiceAsyncStub") -> None:
        while self.embedder is not None and self.embedder.state is EmbedderState.LOADING:
            await asyncio.sleep(_LOADING_POLL_S)
            await self._describe(stub)

    async def _describe(self, stub: "SemanticCacheServiceAsyncStub") -> bytes:
        """Asks for the embedder; the cache's mark."""
        found = await stub.GetEmbedder(pb.GetEmbedderRequest(), timeout=_DESCRIBE_TIMEOUT_S)
        before, self.embedder = (
            self.embedder,
            Embedder(
                state=_STATES.get(found.state, EmbedderState.LOADING),
                model_id=found.model_id,
                dimensions=found.dimensions,
                max_tokens=found.max_tokens,
                max_texts=found.max_texts,
            ),
        )
        if before is None or before.state is not self.embedder.state:
            self._wake()
        return bytes(found.mark)

    def _on_answer(self, in_time: bool) -> None:
        self._timeouts = 0 if in_time else self._timeouts + 1
        if self._timeouts >= _MAX_TIMEOUTS:
            self._suspended_until = self._clock() + _SUSPENDED_S


def _unreachable() -> ReplicaUnavailable:
    return ReplicaUnavailable("the semantic cache can't be reached", retry_after_s=_RETRY_AFTER_S)
