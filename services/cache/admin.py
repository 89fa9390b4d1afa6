"""SemanticCacheAdminService over gRPC: invalidation, bad hits and figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from infermesh.errors import InvalidRequest
from infermesh.telemetry import logs
from infermesh.v1 import semantic_cache_admin_service_pb2 as pb
from infermesh.v1 import semantic_cache_admin_service_pb2_grpc as pb_grpc
from infermesh.v1 import semantic_cache_service_pb2
from services.cache.domain import Keys
from services.cache.embeddings import Embeddings
from services.cache.holdings import Holdings
from services.cache.keeper import Keeper
from services.cache.lookups import Lookups
from services.cache.wire import entry_id_from_pb

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["SemanticCacheAdminService"].full_name
_log = logs.get(__name__)


class CacheAdminServicer(pb_grpc.SemanticCacheAdminServiceServicer):
    """Served beside the cache, for operators."""

    def __init__(
        self,
        lookups: Lookups,
        keeper: Keeper,
        embeddings: Embeddings,
        holdings: Holdings,
        max_bytes: int,
    ) -> None:
        self._lookups = lookups
        self._keeper = keeper
        self._embeddings = embeddings
        self._holdings = holdings
        self._max_bytes = max_bytes

    async def Invalidate(
        self, request: pb.InvalidateRequest, context: Any
    ) -> pb.InvalidateResponse:
        if request.WhichOneof("scope") == "entry_id":
            entry_id = entry_id_from_pb(request.entry_id)
            count = await self._keeper.invalidate_entry(entry_id, dry_run=request.dry_run)
        else:
            count = await self._keeper.invalidate(_scope(request), dry_run=request.dry_run)
        if not request.dry_run:
            _log.info(
                "invalidated",
                extra={"scope": request.WhichOneof("scope"), "num_entries": count},
            )
        return pb.InvalidateResponse(num_entries=count, epoch=self._holdings.epoch)

    async def ReportBadHit(
        self, request: pb.ReportBadHitRequest, context: Any
    ) -> pb.ReportBadHitResponse:
        entry_id = entry_id_from_pb(request.entry_id)
        is_new = await self._keeper.report_bad_hit(entry_id, request.sharing_domain)
        _log.info(
            "a bad hit was reported",
            extra={"entry_id": request.entry_id, "request_id": request.request_id},
        )
        return pb.ReportBadHitResponse(newly_quarantined=is_new)

    async def GetStats(self, request: pb.GetStatsRequest, context: Any) -> pb.GetStatsResponse:
        holdings, journal = self._holdings, self._holdings.journal
        state = self._embeddings.state.name
        response = pb.GetStatsResponse(
            num_entries=len(holdings.store),
            num_semantic_entries=holdings.store.num_indexed,
            num_bytes=holdings.store.num_bytes,
            max_bytes=self._max_bytes,
            num_quarantined=len(holdings.quarantine),
            num_evicted=holdings.removed["evicted"],
            num_expired=holdings.removed["expired"],
            epoch=holdings.epoch,
            compute_seconds_saved=self._lookups.compute_s_saved,
            embedder_state=semantic_cache_service_pb2.EmbedderState.Value(
                f"EMBEDDER_STATE_{state}"
            ),
            num_log_bytes=0 if journal is None else journal.num_bytes + journal.num_snapshot_bytes,
            num_corrupt_records=holdings.num_corrupt,
            is_durable=journal is not None and journal.is_durable,
        )
        for (outcome, reason), count in self._lookups.counts.items():
            response.lookups.add(
                outcome=semantic_cache_service_pb2.LookupOutcome.Value(
                    f"LOOKUP_OUTCOME_{outcome.name}"
                ),
                reason=semantic_cache_service_pb2.LookupReason.Value(
                    f"LOOKUP_REASON_{reason.name}"
                ),
                num_lookups=count,
            )
        return response


def _scope(request: pb.InvalidateRequest) -> Callable[[Keys], bool] | None:
    """Which entries; None for all."""
    kind = request.WhichOneof("scope")
    if kind == "tenant":
        return lambda keys: keys.tenant == request.tenant
    if kind == "model_id":
        return lambda keys: keys.model_id == request.model_id
    if kind == "sharing_domain":
        return lambda keys: keys.sharing_domain == request.sharing_domain
    if kind == "all" and request.all:
        return None
    raise InvalidRequest(
        "no scope: give entry_id, tenant, model_id, sharing_domain or all", param="scope"
    )
