"""AuthService over gRPC: calls to the stores and back. Errors are the interceptor's to map."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from infermesh.errors import InvalidRequest, MeshError, ProtocolViolation
from infermesh.v1 import auth_service_pb2 as pb
from infermesh.v1.auth_service_pb2_grpc import AuthServiceServicer as Base
from services.auth import metrics, wire
from services.auth.changes import Change, ChangeFeed
from services.auth.keys import Keys
from services.auth.lease_store import LeaseStore
from services.auth.ledger import Ledger
from services.auth.values import Gateway

_HEARTBEAT_S = 1.0
_MAX_USAGE_ROWS = 100_000


class AuthServicer(Base):
    """Serves gateways."""

    def __init__(self, keys: Keys, leases: LeaseStore, ledger: Ledger, feed: ChangeFeed) -> None:
        self._keys = keys
        self._leases = leases
        self._ledger = ledger
        self._feed = feed

    async def Authenticate(
        self, request: pb.AuthenticateRequest, context: Any
    ) -> pb.AuthenticateResponse:
        try:
            verified = await self._keys.verify(request.api_key)
        except MeshError as error:
            metrics.AUTHENTICATIONS.labels(error.code).inc()
            raise
        metrics.AUTHENTICATIONS.labels("ok").inc()
        return wire.verified_to_pb(verified)

    async def Lease(
        self, request_iterator: AsyncIterator[pb.LeaseRequest], context: Any
    ) -> AsyncIterator[pb.LeaseResponse]:
        gateway: Gateway | None = None
        async for message in request_iterator:
            if message.HasField("hello"):
                gateway = Gateway(message.hello.gateway_id, message.hello.incarnation)
                if not 1 <= len(gateway.id) <= 128 or not 1 <= len(gateway.incarnation) <= 64:
                    raise ProtocolViolation("hello needs a gateway_id and an incarnation")
                await self._leases.hello(gateway)
            elif gateway is None:
                raise ProtocolViolation("a lease report before hello")
            else:
                reports = [wire.report_from_pb(state) for state in message.report.leases]
                grants = [await self._leases.report(gateway, report) for report in reports]
                for grant in grants:
                    metrics.LEASE_REPORTS.labels("refused" if grant.refused else "granted").inc()
                yield pb.LeaseResponse(grants=map(wire.grant_to_pb, grants))

    async def WatchRevocations(
        self, request: pb.WatchRevocationsRequest, context: Any
    ) -> AsyncIterator[pb.WatchRevocationsResponse]:
        after = request.after_sequence if request.HasField("after_sequence") else None
        number, missed = await self._feed.position(after)
        position = pb.WatchPosition(resync=missed)
        yield pb.WatchRevocationsResponse(sequence=number, position=position)
        async for found in self._feed.follow(number, _HEARTBEAT_S):
            for change in found:
                number = change.sequence
                yield _change_to_pb(change)
            if not found:
                beat = pb.WatchHeartbeat()
                yield pb.WatchRevocationsResponse(sequence=number, heartbeat=beat)

    async def RecordUsage(
        self, request_iterator: AsyncIterator[pb.RecordUsageRequest], context: Any
    ) -> pb.RecordUsageResponse:
        rows = []
        async for message in request_iterator:
            rows.append(wire.usage_from_pb(message.record))
            if len(rows) > _MAX_USAGE_ROWS:
                raise InvalidRequest(f"more than {_MAX_USAGE_ROWS} records in one call")
        num_stored = await self._ledger.append(rows)
        metrics.USAGE_STORED.inc(num_stored)
        metrics.USAGE_DUPLICATES.inc(len(rows) - num_stored)
        return pb.RecordUsageResponse(num_stored=num_stored, num_duplicates=len(rows) - num_stored)


def _change_to_pb(change: Change) -> pb.WatchRevocationsResponse:
    if change.key_id is not None:
        return pb.WatchRevocationsResponse(sequence=change.sequence, key_id=change.key_id)
    tenant_id = change.tenant_id or ""
    return pb.WatchRevocationsResponse(sequence=change.sequence, tenant_id=tenant_id)
