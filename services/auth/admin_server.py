"""AuthAdminService over gRPC: calls to the stores and back. Who may call is its socket's matter."""

from __future__ import annotations

from typing import Any

from infermesh.quota import limits_from_pb
from infermesh.v1 import auth_admin_service_pb2 as pb
from infermesh.v1.auth_admin_service_pb2_grpc import AuthAdminServiceServicer as Base
from services.auth import wire
from services.auth.keys import Keys
from services.auth.ledger import Ledger
from services.auth.tenants import Tenants
from services.auth.values import Policy


class AuthAdminServicer(Base):
    """Serves operators."""

    def __init__(self, tenants: Tenants, keys: Keys, ledger: Ledger) -> None:
        self._tenants = tenants
        self._keys = keys
        self._ledger = ledger

    async def CreateTenant(
        self, request: pb.CreateTenantRequest, context: Any
    ) -> pb.CreateTenantResponse:
        limits = limits_from_pb(request.limits)
        given = request.HasField("policy")
        policy = wire.policy_from_pb(request.policy) if given else Policy()
        tenant = await self._tenants.create(request.id, request.name, limits, policy)
        return pb.CreateTenantResponse(tenant=wire.tenant_to_pb(tenant))

    async def ListTenants(
        self, request: pb.ListTenantsRequest, context: Any
    ) -> pb.ListTenantsResponse:
        return pb.ListTenantsResponse(tenants=map(wire.tenant_to_pb, await self._tenants.list()))

    async def UpdateTenant(
        self, request: pb.UpdateTenantRequest, context: Any
    ) -> pb.UpdateTenantResponse:
        limits = limits_from_pb(request.limits) if request.HasField("limits") else None
        policy = wire.policy_from_pb(request.policy) if request.HasField("policy") else None
        tenant = await self._tenants.update(request.id, limits, policy)
        return pb.UpdateTenantResponse(tenant=wire.tenant_to_pb(tenant))

    async def CreateKey(self, request: pb.CreateKeyRequest, context: Any) -> pb.CreateKeyResponse:
        key, text = await self._keys.create(
            request.tenant_id,
            request.name,
            request.scopes,
            request.models,
            wire.seconds_from_pb(request, "valid_for"),
        )
        return pb.CreateKeyResponse(key=wire.key_to_pb(key), api_key=text)

    async def ListKeys(self, request: pb.ListKeysRequest, context: Any) -> pb.ListKeysResponse:
        found = await self._keys.list(request.tenant_id)
        return pb.ListKeysResponse(keys=map(wire.key_to_pb, found))

    async def RotateKey(self, request: pb.RotateKeyRequest, context: Any) -> pb.RotateKeyResponse:
        overlap_s = wire.seconds_from_pb(request, "overlap") or 0.0
        key, text = await self._keys.rotate(request.key_id, overlap_s)
        return pb.RotateKeyResponse(key=wire.key_to_pb(key), api_key=text)

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Any) -> pb.RevokeKeyResponse:
        return pb.RevokeKeyResponse(key=wire.key_to_pb(await self._keys.revoke(request.key_id)))

    async def QueryUsage(
        self, request: pb.QueryUsageRequest, context: Any
    ) -> pb.QueryUsageResponse:
        totals = await self._ledger.totals(wire.query_from_pb(request))
        return pb.QueryUsageResponse(totals=map(wire.total_to_pb, totals))
