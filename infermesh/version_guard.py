"""Refuses callers whose protocol this process does not speak, and says once who is far apart.

Looks at the head of a call only; messages cost nothing. What is compatible is `version.py`'s.
"""

from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any

import grpc

from infermesh.errors import IncompatibleVersion
from infermesh.rpc_handler import with_behaviour
from infermesh.telemetry import logs
from infermesh.version import HERE, Build, are_far_apart, from_user_agent, incompatibility

_log = logs.get(__name__)
# Whatever callers claim to be: no log fills, no memory grows.
_MAX_REPORTED = 32


class VersionGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc is untyped
    """Raises IncompatibleVersion in a handler's place; an interceptor around it gives the status.

    Args:
        here: what this process is.
    """

    def __init__(self, here: Build = HERE) -> None:
        self._here = here
        self._reported: set[tuple[str, str]] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        caller = _caller(details)
        if handler is None or caller is None or caller == self._here:
            return handler
        service = details.method.rpartition("/")[0].rpartition(".")[2]
        refusal = incompatibility(service, self._here, caller)
        if refusal is not None:
            self._report(service, caller, refusal)
            return _refusing(handler, refusal)
        if are_far_apart(self._here.version, caller.version):
            self._report(service, caller, "more than one minor version apart, which is not tested")
        return handler

    def _report(self, service: str, caller: Build, why: str) -> None:
        key = (service, caller.version)
        if key not in self._reported and len(self._reported) < _MAX_REPORTED:
            self._reported.add(key)
            versions = {"version": self._here.version, "caller_version": caller.version}
            _log.warning("versions differ", extra={"service": service, **versions, "why": why})


def _caller(details: grpc.HandlerCallDetails) -> Build | None:
    for key, value in details.invocation_metadata:
        if key == "user-agent":
            return _parsed(value)
    return None


_parsed = lru_cache(maxsize=64)(from_user_agent)


def _refusing(handler: grpc.RpcMethodHandler, refusal: str) -> grpc.RpcMethodHandler:
    async def unary(request: Any, context: Any) -> Any:
        raise IncompatibleVersion(refusal)

    async def stream(request: Any, context: Any) -> Any:
        raise IncompatibleVersion(refusal)
        yield  # makes it a generator, as streams are

    return with_behaviour(handler, stream if handler.response_streaming else unary)
