"""SemanticCacheService over gRPC: calls to the cache's parts, and their results to pb."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from infermesh import lifecycle
from infermesh.config import CacheConfig
from infermesh.errors import Draining
from infermesh.telemetry import logs, tracing
from infermesh.v1 import semantic_cache_service_pb2 as pb
from infermesh.v1 import semantic_cache_service_pb2_grpc as pb_grpc
from services.cache.domain import StoreOutcome
from services.cache.embedding import model_id_of
from services.cache.embeddings import Embeddings
from services.cache.holdings import Holdings
from services.cache.keeper import Keeper
from services.cache.lookups import Lookups
from services.cache.session import LookupSession
from services.cache.wire import draft_from_pb, mark_to_pb

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["SemanticCacheService"].full_name
_log = logs.get(__name__)


class CacheServicer(pb_grpc.SemanticCacheServiceServicer):
    """Readers of lookup calls and open lookups run in `tasks`, the service's own task group."""

    def __init__(
        self,
        lookups: Lookups,
        keeper: Keeper,
        embeddings: Embeddings,
        holdings: Holdings,
        config: CacheConfig,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._lookups = lookups
        self._keeper = keeper
        self._embeddings = embeddings
        self._holdings = holdings
        self._model_id = model_id_of(config.embedder)
        self._max_texts = config.embed_max_texts
        self._tasks = tasks
        self._sessions: set[LookupSession] = set()
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Opens no new call and ends the streams."""
        self._draining.set()
        for session in list(self._sessions):
            session.drain()

    async def Lookup(
        self, request_iterator: AsyncIterator[pb.LookupRequest], context: Any
    ) -> AsyncIterator[pb.LookupResponse]:
        self._check_open()
        session = LookupSession(self._lookups, self._tasks)
        # Both: the generator may be closed late, the callback does not run if it never started.
        context.add_done_callback(lambda _: session.close())
        self._sessions.add(session)
        reader = self._tasks.create_task(session.read(request_iterator))
        try:
            async for response in session.responses():
                yield response
        finally:
            reader.cancel()
            session.close()
            self._sessions.discard(session)

    async def Store(
        self, request_iterator: AsyncIterator[pb.StoreRequest], context: Any
    ) -> pb.StoreResponse:
        self._check_open()
        counts: Counter[StoreOutcome] = Counter()
        keeping = self._keep_all(request_iterator, counts)
        if not await lifecycle.first(keeping, self._draining.wait(), self._tasks):
            raise Draining("the cache is stopping; what arrived is kept")
        if self._holdings.journal is not None:
            await self._holdings.journal.written()
        return pb.StoreResponse(
            counts=[
                pb.StoreCount(
                    outcome=pb.StoreOutcome.Value(f"STORE_OUTCOME_{outcome.name}"),
                    num_entries=count,
                )
                for outcome, count in counts.items()
            ]
        )

    async def _keep_all(
        self, requests: AsyncIterator[pb.StoreRequest], counts: Counter[StoreOutcome]
    ) -> None:
        try:
            async for request in requests:
                draft = draft_from_pb(request.entry)
                if isinstance(draft, StoreOutcome):
                    self._keeper.count(draft)
                    counts[draft] += 1
                else:
                    counts[self._keeper.keep(draft)] += 1
        except Exception as exc:  # the call broke: its own end says why
            _log.debug("a store call ended early", extra={"error": type(exc).__name__})

    async def Embed(
        self, request: pb.SemanticCacheServiceEmbedRequest, context: Any
    ) -> pb.SemanticCacheServiceEmbedResponse:
        self._check_open()
        attributes: dict[str, str | int | float | bool] = {
            "infermesh.request_id": request.request_id,
            "infermesh.num_texts": len(request.texts),
        }
        with tracing.span("cache.embed", traceparent=request.traceparent, attributes=attributes):
            embedded = await self._embeddings.embed(
                request.texts, allow_truncation=request.allow_truncation
            )
        facts = self._embeddings.facts
        assert facts is not None
        return pb.SemanticCacheServiceEmbedResponse(
            embeddings=[
                pb.Embedding(
                    values=one.vector, num_tokens=one.num_tokens, truncated=one.is_truncated
                )
                for one in embedded
            ],
            model_id=facts.model_id,
            dimensions=facts.dimensions,
        )

    async def GetEmbedder(
        self, request: pb.GetEmbedderRequest, context: Any
    ) -> pb.GetEmbedderResponse:
        response = pb.GetEmbedderResponse(
            state=pb.EmbedderState.Value(f"EMBEDDER_STATE_{self._embeddings.state.name}"),
            model_id=self._model_id,
            max_texts=self._max_texts,
            mark=mark_to_pb(self._lookups.mark),
        )
        facts = self._embeddings.facts
        if facts is not None:
            response.model_fingerprint = facts.fingerprint
            response.dimensions = facts.dimensions
            response.max_tokens = facts.max_tokens
        return response

    def _check_open(self) -> None:
        if self._draining.is_set():
            raise Draining("the cache is stopping")
