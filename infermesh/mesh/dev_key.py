"""One key for the person who runs `infermesh up`: made once, kept, and reused while it is good."""

import contextlib

import grpc

from infermesh import rpc
from infermesh.errors import AlreadyExists, InvalidApiKey, from_rpc_error
from infermesh.mesh.plan import AuthPlan
from infermesh.mesh.state import StateFolder
from infermesh.security.certificates import Certificates
from infermesh.security.identities import Identity
from infermesh.v1 import auth_admin_service_pb2 as admin_pb
from infermesh.v1 import auth_service_pb2 as pb
from infermesh.v1.auth_admin_service_pb2_grpc import AuthAdminServiceStub
from infermesh.v1.auth_service_pb2_grpc import AuthServiceStub

TENANT = "local"
_CALL_S = 10.0


async def obtain(
    plan: AuthPlan, state: StateFolder, certificates: Certificates | None = None
) -> str:
    """The key's text.

    Raises:
        MeshError: the auth service does not answer.
        OSError: the key can't be kept.
    """
    try:
        async with rpc.channel(plan.address, Identity.AUTH, certificates) as channel:
            kept = state.read_key()
            if kept is not None and await _is_good(AuthServiceStub(channel), kept):
                return kept
        async with rpc.channel(plan.admin_address, Identity.AUTH, certificates) as channel:
            made = await _make(AuthAdminServiceStub(channel))
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None
    state.keep_key(made)
    return made


async def _is_good(stub: AuthServiceStub, api_key: str) -> bool:
    request = pb.AuthenticateRequest(api_key=api_key)
    try:
        await stub.Authenticate(request, timeout=_CALL_S)
    except grpc.aio.AioRpcError as error:
        if isinstance(from_rpc_error(error), InvalidApiKey):
            return False  # of another database, or revoked
        raise
    return True


async def _make(stub: AuthAdminServiceStub) -> str:
    policy = pb.TenantPolicy(weight=1.0, semantic_cache=True)
    tenant = admin_pb.CreateTenantRequest(id=TENANT, name="This machine", policy=policy)
    with contextlib.suppress(AlreadyExists):
        try:
            await stub.CreateTenant(tenant, timeout=_CALL_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
    request = admin_pb.CreateKeyRequest(tenant_id=TENANT, name="infermesh up")
    answer = await stub.CreateKey(request, timeout=_CALL_S)
    api_key: str = answer.api_key
    return api_key
