"""Turns credentials into principals: from the cache, or by asking the auth service. Keeps the cache
right by following the change feed.
"""

import asyncio
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc

from gateway.auth.instances import Picker
from gateway.auth.metrics import KEY_CHECKS
from gateway.auth.principals import Digest, PrincipalCache, digest
from gateway.auth.translate import principal_from_pb, seconds_from_pb
from gateway.identity import Principal
from infermesh.errors import (
    AuthUnavailable,
    DeadlineExceeded,
    InvalidApiKey,
    MeshError,
    Unavailable,
    from_rpc_error,
)
from infermesh.telemetry import logs
from infermesh.v1 import auth_service_pb2 as pb

if TYPE_CHECKING:  # the type of the asyncio stub exists in the stubs alone
    from infermesh.v1.auth_service_pb2_grpc import AuthServiceAsyncStub

_log = logs.get(__name__)
_ASK_S = 2.0
# The auth service says something every second.
_SILENCE_S = 3.0
_RETRY_S = 0.1
_RETRY_AFTER_S = 1.0
# A caller who is not known here waits so long for an auth service that is away: a restart takes
# about two seconds.
PATIENCE_S = 5.0
_MAX_KEY_CHARS = 8192  # of a token
_NO_KEY = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header "
    "using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
)


class Verifier:
    """Identifies callers.

    Args:
        on_tenant_change: called with the tenant whose limits may be others now.
    """

    def __init__(
        self,
        auth: Picker,
        cache: PrincipalCache,
        on_tenant_change: Callable[[str], None],
    ) -> None:
        self._auth = auth
        self._cache = cache
        self._on_tenant_change = on_tenant_change
        self._asking: dict[Digest, asyncio.Lock] = {}

    async def identify(self, credential: str | None) -> Principal:
        """Whom a credential belongs to.

        Raises:
            InvalidApiKey: nobody.
            AuthUnavailable: it is not known here, and the auth service does not answer.
        """
        if not credential:
            raise InvalidApiKey(_NO_KEY)
        if len(credential) > _MAX_KEY_CHARS:
            raise InvalidApiKey("Incorrect API key provided: it is too long.")
        key = digest(credential)
        principal = self._cache.fresh(key)
        if principal is not None:
            return principal
        lock = self._asking.setdefault(key, asyncio.Lock())
        known = self._cache.stale(key) if lock.locked() else None
        if known is not None:
            return known  # somebody asks already, and this one need not wait
        try:
            # one question for all who wait with the same key
            async with asyncio.timeout(PATIENCE_S), lock:
                return self._cache.fresh(key) or await self._ask(key, credential)
        except TimeoutError:
            raise AuthUnavailable(
                "the API key can't be checked now; try again", retry_after_s=_RETRY_AFTER_S
            ) from None
        finally:
            if not lock.locked():
                self._asking.pop(key, None)

    async def follow(self) -> None:
        """Follows the change feed, reconnecting, until cancelled."""
        while True:
            stub = self._auth.stub
            try:
                await self._follow(stub)
            except (grpc.aio.AioRpcError, TimeoutError) as exc:
                self._auth.failed(stub)
                _log.debug("change feed broke", extra={"error": str(exc)})
            self._cache.unwatched()
            # jitter: many gateways come back at once
            await asyncio.sleep(_RETRY_S * (1 + secrets.randbelow(100) / 100))

    async def _ask(self, key: Digest, credential: str) -> Principal:
        """Asks until there is an answer, or the key may go on without one."""
        request = pb.AuthenticateRequest(api_key=credential)
        while True:
            stub = self._auth.stub
            try:
                answer = await stub.Authenticate(request, timeout=_ASK_S)
                break
            except grpc.aio.AioRpcError as exc:
                self._ask_another(stub, exc)
                principal = self._without_answer(key, from_rpc_error(exc))
            if principal is not None:
                return principal
            await asyncio.sleep(_RETRY_S)
        KEY_CHECKS.labels("ok").inc()
        principal = principal_from_pb(answer.principal)
        valid_for_s = seconds_from_pb(answer.principal, "valid_for")
        self._cache.put(key, principal, valid_for_s, answer.sequence)
        return principal

    def _without_answer(self, key: Digest, error: MeshError) -> Principal | None:
        """None where asking again may help."""
        KEY_CHECKS.labels(error.code).inc()
        if isinstance(error, InvalidApiKey):
            self._cache.refuse(key, error.message)
            raise error from None
        principal = self._cache.stale(key)
        if principal is None and not isinstance(error, Unavailable | DeadlineExceeded):
            raise error from None
        return principal

    def _ask_another(self, stub: "AuthServiceAsyncStub", error: grpc.aio.AioRpcError) -> None:
        if isinstance(from_rpc_error(error), Unavailable | DeadlineExceeded):
            self._auth.failed(stub)

    async def _follow(self, stub: "AuthServiceAsyncStub") -> None:
        request = pb.WatchRevocationsRequest(after_sequence=self._cache.sequence)
        call = stub.WatchRevocations(request)
        try:
            while True:
                async with asyncio.timeout(_SILENCE_S):
                    message = await call.read()
                if not isinstance(message, pb.WatchRevocationsResponse):  # the end of the stream
                    return
                self._see(message)
        finally:
            call.cancel()

    def _see(self, message: Any) -> None:
        kind = message.WhichOneof("kind")
        if kind == "position":
            self._cache.watched(message.sequence, resync=message.position.resync)
        elif kind == "key_id":
            self._cache.drop(message.sequence, key_id=message.key_id)
        elif kind == "tenant_id":
            self._cache.drop(message.sequence, tenant=message.tenant_id)
            self._on_tenant_change(message.tenant_id)
