"""Holds every call against the allow-list, by the identity in the caller's certificate."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from infermesh.errors import PermissionDenied
from infermesh.rpc_handler import behaviour_of, with_behaviour
from infermesh.security.allow_list import ALLOWED, may_call
from infermesh.security.identities import Identity, from_spiffe_id
from infermesh.telemetry import logs, metrics

_log = logs.get(__name__)
_REFUSALS = metrics.counter(
    "rpc_refusals_total",
    "Calls refused because their caller may not make them, by method and identity.",
    ("method", "identity"),
)
_NOBODY = "unknown"


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc is untyped
    """Raises PermissionDenied in a handler's place; an interceptor around it gives the status."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        if handler is None:
            return None
        return with_behaviour(handler, _guarded(behaviour_of(handler), details.method))


def caller(context: Any) -> Identity | None:
    """Who calls, as the certificate says that TLS has verified; None: nobody of this mesh."""
    ids = context.auth_context().get("peer_spiffe_id", ())
    return from_spiffe_id(ids[0].decode()) if len(ids) == 1 else None


def _guarded(inner: Callable[..., Any], method: str) -> Callable[..., Any]:
    def call(request: Any, context: Any) -> Any:
        identity = caller(context)
        if not may_call(identity, method):
            raise _refusal(identity, method, context.peer())
        return inner(request, context)

    return call


def _refusal(identity: Identity | None, method: str, peer: str) -> PermissionDenied:
    name = _NOBODY if identity is None else identity.value
    # bounded, whatever a caller asks for
    _REFUSALS.labels(method if method in ALLOWED else "other", name).inc()
    _log.warning("call refused", extra={"method": method, "identity": name, "peer": peer})
    who = f"the identity {name}" if identity else "a caller without an identity of this mesh"
    return PermissionDenied(f"{who} may not call {method}")
