"""A cache without an embedder: a real SemanticCacheService on a unix socket; a test decides what
means the same, what hangs and what is slow.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from infermesh import rpc
from infermesh.errors import MeshError, NotFound
from infermesh.v1 import semantic_cache_admin_service_pb2 as admin_pb
from infermesh.v1 import semantic_cache_service_pb2 as pb
from infermesh.v1.semantic_cache_admin_service_pb2_grpc import (
    SemanticCacheAdminServiceServicer,
    add_SemanticCacheAdminServiceServicer_to_server,
)
from infermesh.v1.semantic_cache_service_pb2_grpc import (
    SemanticCacheServiceServicer,
    add_SemanticCacheServiceServicer_to_server,
)

SIMILARITY = 0.9725
AGE_S = 7
DIMENSIONS = 4
MAX_TOKENS = 256
Answers = asyncio.Queue[pb.LookupResponse | MeshError]


class FakeCache(SemanticCacheServiceServicer, SemanticCacheAdminServiceServicer):
    """One cache.

    Attributes:
        all_mean_the_same: a stored answer fits every text with an equal compatibility fingerprint.
        hangs: no lookup is answered.
        holds_semantic: what the exact tier has no answer to waits for `release`.
        mark: what responses carry.
        queries, entries, cancelled, embedded: what the gateway sent, in order.
        embed_error: what Embed fails with.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.all_mean_the_same = False
        self.hangs = False
        self.holds_semantic = False
        self.age_s = AGE_S
        self.mark = b"first"
        self.embedder_state = pb.EMBEDDER_STATE_READY
        self.queries: list[pb.Query] = []
        self.entries: list[pb.Entry] = []
        self.cancelled: list[int] = []
        self.embedded: list[list[str]] = []
        self.embed_error: MeshError | None = None
        self.invalidations: list[admin_pb.InvalidateRequest] = []
        self.reports: list[admin_pb.ReportBadHitRequest] = []
        self._held: list[tuple[pb.Query, Answers]] = []
        self._streams: list[Answers] = []
        self._changed = asyncio.Condition()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listens."""
        self._server = rpc.create_server()
        add_SemanticCacheServiceServicer_to_server(self, self._server)
        add_SemanticCacheAdminServiceServicer_to_server(self, self._server)
        rpc.bind(self._server, self.address)
        await self._server.start()

    async def kill(self) -> None:
        """As `kill -9` looks from outside."""
        if self._server is not None:
            await self._server.stop(0)

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Until the gateway's messages have made `condition` true."""
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(condition)

    async def kept(self, count: int) -> None:
        """Until so many answers were stored."""
        await self.wait(lambda: len(self.entries) >= count)

    def release(self) -> None:
        """Answers what was held."""
        for query, answers in self._held:
            answers.put_nowait(self._answer(query))
        self._held.clear()

    def break_lookups(self, error: MeshError) -> None:
        """Ends every Lookup stream."""
        for answers in self._streams:
            answers.put_nowait(error)

    # the service

    async def Lookup(
        self, requests: AsyncIterator[pb.LookupRequest], context: Any
    ) -> AsyncIterator[pb.LookupResponse]:
        answers: Answers = asyncio.Queue()
        self._streams.append(answers)
        reader = asyncio.create_task(self._read(requests, answers))
        try:
            while True:
                answer = await answers.get()
                if isinstance(answer, MeshError):
                    raise answer
                yield answer
        finally:
            reader.cancel()
            self._streams.remove(answers)

    async def Store(
        self, requests: AsyncIterator[pb.StoreRequest], context: Any
    ) -> pb.StoreResponse:
        async for request in requests:
            self.entries.append(request.entry)
            await self._notify()
        return pb.StoreResponse()

    async def Embed(
        self, request: pb.SemanticCacheServiceEmbedRequest, context: Any
    ) -> pb.SemanticCacheServiceEmbedResponse:
        self.embedded.append(list(request.texts))
        if self.embed_error is not None:
            raise self.embed_error
        return pb.SemanticCacheServiceEmbedResponse(
            embeddings=[
                pb.Embedding(values=vector_of(text), num_tokens=len(text.split()) + 2)
                for text in request.texts
            ],
            model_id="mini",
            dimensions=DIMENSIONS,
        )

    async def GetEmbedder(
        self, request: pb.GetEmbedderRequest, context: Any
    ) -> pb.GetEmbedderResponse:
        return pb.GetEmbedderResponse(
            state=self.embedder_state,
            model_id="mini",
            model_fingerprint="e" * 64,
            dimensions=DIMENSIONS,
            max_tokens=MAX_TOKENS,
            max_texts=3,
            mark=self.mark,
        )

    async def ReportBadHit(
        self, request: admin_pb.ReportBadHitRequest, context: Any
    ) -> admin_pb.ReportBadHitResponse:
        if not request.entry_id.startswith("entry-"):
            raise NotFound(f"no entry {request.entry_id}")
        self.reports.append(request)
        return admin_pb.ReportBadHitResponse(newly_quarantined=len(self.reports) == 1)

    async def Invalidate(
        self, request: admin_pb.InvalidateRequest, context: Any
    ) -> admin_pb.InvalidateResponse:
        self.invalidations.append(request)
        return admin_pb.InvalidateResponse(num_entries=2, epoch=1)

    # inside

    async def _read(self, requests: AsyncIterator[pb.LookupRequest], answers: Answers) -> None:
        async for request in requests:
            if request.HasField("cancel"):
                self.cancelled.append(request.cancel.lookup_id)
            else:
                query = request.query
                self.queries.append(query)
                answer = self._answer(query)
                if self.holds_semantic and answer.outcome != pb.LOOKUP_OUTCOME_HIT_EXACT:
                    self._held.append((query, answers))
                elif not self.hangs:
                    answers.put_nowait(answer)
            await self._notify()

    def _answer(self, query: pb.Query) -> pb.LookupResponse:
        mine = [e for e in self.entries if e.sharing_domain == query.sharing_domain]
        exact = [e for e in mine if e.exact_fingerprint == query.exact_fingerprint]
        if exact and not (query.HasField("max_age") and query.max_age.seconds < self.age_s):
            return self._hit(query, exact[-1], pb.LOOKUP_OUTCOME_HIT_EXACT)
        alike = [e for e in mine if e.compatibility_fingerprint == query.compatibility_fingerprint]
        if alike and query.traits.semantic_enabled and query.text and self.all_mean_the_same:
            return self._hit(query, alike[-1], pb.LOOKUP_OUTCOME_HIT_SEMANTIC)
        return pb.LookupResponse(
            lookup_id=query.lookup_id,
            outcome=pb.LOOKUP_OUTCOME_MISS,
            reason=pb.LOOKUP_REASON_TOO_OLD if exact else pb.LOOKUP_REASON_NO_CANDIDATE,
            mark=self.mark,
        )

    def _hit(
        self, query: pb.Query, entry: pb.Entry, outcome: "pb.LookupOutcome.ValueType"
    ) -> pb.LookupResponse:
        is_exact = outcome == pb.LOOKUP_OUTCOME_HIT_EXACT
        reason = pb.LOOKUP_REASON_SAME_REQUEST if is_exact else pb.LOOKUP_REASON_SAME_MEANING
        response = pb.LookupResponse(
            lookup_id=query.lookup_id,
            outcome=outcome,
            reason=reason,
            entry_id=f"entry-{self.entries.index(entry)}",
            answer=entry.answer,
            mark=self.mark,
        )
        response.age.FromSeconds(self.age_s)
        if not is_exact:
            response.similarity = SIMILARITY
        return response

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def vector_of(text: str) -> list[float]:
    """A unit vector of its own for each length of text."""
    vector = [0.0] * DIMENSIONS
    vector[len(text) % DIMENSIONS] = 1.0
    return vector
