"""gRPC servers and channels as every service makes them: limits, keepalive, errors, health.

Owns no service. Addresses are `host:port` or `unix:/path`.
"""

import asyncio
import inspect
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import grpc

from infermesh import rpc_status
from infermesh.config_fields import ConfigError
from infermesh.errors import Internal, MeshError, SlowConsumer, as_mesh_error
from infermesh.rpc_handler import behaviour_of, with_behaviour
from infermesh.security.certificates import Certificates, Material, channel_credentials
from infermesh.security.guard import Guard
from infermesh.security.identities import Identity
from infermesh.security.renewing_channel import RenewingChannel
from infermesh.telemetry import logs
from infermesh.telemetry.calls import CallMetrics
from infermesh.telemetry.vitals import PROCESS
from infermesh.version import HERE
from infermesh.version_guard import VersionGuard

MAX_MESSAGE_BYTES = 32 << 20
_log = logs.get(__name__)

_COMMON = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
# Without the first two, a peer's keepalive pings end its streams with GOAWAY too_many_pings.
_SERVER = (
    *_COMMON,
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.enable_channelz", 1),
)
_CHANNEL = (
    *_COMMON,
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_channelz", 1),
    # Channels to one address must not share a backoff: a probe must not delay a session.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.secondary_user_agent", str(HERE)),
)


def create_server(
    *,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    max_concurrent: int | None = None,
    write_timeout_s: float | None = None,
    reuse_port: bool = False,
    guarded: bool = False,
) -> grpc.aio.Server:
    """A server whose handlers may simply raise MeshError.

    Args:
        write_timeout_s: a stream whose client takes nothing for so long ends with SLOW_CONSUMER.
        reuse_port: others may listen at its address at the same time, if they say so as well.
        guarded: callers are held against the allow-list; it wants certificates when it is bound.
    """
    options = (*_SERVER, ("grpc.so_reuseport", int(reuse_port)))
    guards = [Guard()] if guarded else []
    return grpc.aio.server(
        interceptors=[
            CallMetrics(),
            ErrorInterceptor(write_timeout_s),
            VersionGuard(),
            *guards,
            *interceptors,
        ],
        options=options,
        maximum_concurrent_rpcs=max_concurrent,
    )


def bind(server: grpc.aio.Server, address: str, certificates: Certificates | None = None) -> str:
    """Binds `server` and returns the bound address; a unix socket is its owner's alone (0600).

    Args:
        certificates: with them it takes mutual TLS alone.

    Raises:
        ConfigError: the address is in use, or can't be bound.
    """
    try:
        if certificates is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, certificates.server_credentials())
    except RuntimeError:
        raise ConfigError(f"the address {address} is in use or can't be bound") from None
    if address.startswith("unix:"):
        os.chmod(address.removeprefix("unix:"), 0o600)
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def channel(
    address: str, to: Identity | None = None, certificates: Certificates | None = None
) -> grpc.aio.Channel:
    """A channel to a peer; create it inside the event loop that uses it.

    Args:
        to: who the peer must be; needed with certificates.
        certificates: with them it speaks mutual TLS alone.
    """
    if certificates is None:
        return grpc.aio.insecure_channel(address, options=_CHANNEL)
    assert to is not None, "with TLS a peer has an identity"
    options = (*_CHANNEL, *as_server(to))

    def make(material: Material) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(address, channel_credentials(material), options=options)

    return RenewingChannel(certificates, make)


def as_server(identity: Identity) -> tuple[tuple[str, str], ...]:
    """Options of a channel whose peer must have this identity, whatever the address."""
    return (("grpc.default_authority", identity.server_name),)


def deadline_s(context: "grpc.aio.ServicerContext[Any, Any]") -> float | None:
    """Seconds that the caller still waits; None where it set no deadline."""
    remaining = context.time_remaining()
    # grpc gives a time of decades where there is none
    return remaining if remaining is not None and remaining < 10**8 else None


class HealthHandle:
    """What grpc.health.v1 answers for this server."""

    def __init__(self, servicer: Any, names: Sequence[str]) -> None:
        self._servicer = servicer
        self._names = ("", *names)

    async def set_serving(self, serving: bool) -> None:
        """SERVING or NOT_SERVING, for the server as a whole and each of its services."""
        for name in self._names[1:]:
            PROCESS.report(name, serving)
        if self._servicer is None:
            return
        from grpc_health.v1 import health_pb2

        kind = health_pb2.HealthCheckResponse
        for name in self._names:
            await self._servicer.set(name, kind.SERVING if serving else kind.NOT_SERVING)


def add_standard_services(server: grpc.aio.Server, service_names: Sequence[str]) -> HealthHandle:
    """Health, reflection and channelz, as far as their packages are installed."""
    try:
        from grpc_channelz.v1 import channelz, channelz_pb2
        from grpc_health.v1 import health, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection
    except ImportError:  # a bare compute host
        return HealthHandle(None, service_names)
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    channelz.add_channelz_servicer(server)
    channelz_name = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name
    names = (*service_names, health.SERVICE_NAME, channelz_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return HealthHandle(servicer, service_names)


async def abort(context: Any, exc: BaseException) -> None:
    """Ends the call with the error's status, reason and details."""
    error = as_mesh_error(exc)
    if type(error) is Internal and not isinstance(exc, MeshError):
        _log.error("a handler failed", exc_info=exc)
    await context.abort(error.grpc_code, error.message, rpc_status.trailers(error))


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc is untyped
    """Turns what a handler raises into a status with details; cancellation passes through."""

    def __init__(self, write_timeout_s: float | None = None) -> None:
        self._write_timeout_s = write_timeout_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        if handler is None:
            return None
        inner = behaviour_of(handler)
        if handler.response_streaming:
            return with_behaviour(handler, _wrap_stream(inner, self._write_timeout_s))
        return with_behaviour(handler, _wrap_unary(inner))


def _wrap_unary(inner: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await inner(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as exc:
            await abort(context, exc)

    return call


def _wrap_stream(
    inner: Callable[..., AsyncGenerator[Any, None] | Awaitable[None]], write_timeout_s: float | None
) -> Callable[..., Awaitable[None]]:
    async def write(response: Any, context: Any) -> None:
        try:
            async with asyncio.timeout(write_timeout_s):
                await context.write(response)
        except TimeoutError:
            raise SlowConsumer(f"the client took nothing for {write_timeout_s} s") from None

    async def call(request: Any, context: Any) -> None:
        try:
            found = inner(request, context)
            if inspect.isawaitable(found):  # it writes to the context itself: health's Watch does
                await found
                return
            # Closed here, in the call's own task, however the call ends.
            async with aclosing(found) as responses:
                async for response in responses:
                    await write(response, context)
        except grpc.aio.AbortError:
            raise
        except Exception as exc:
            await abort(context, exc)

    return call
