"""A gRPC channel that follows its certificates: each new call goes over a connection that was made
with the current ones, and calls under way end where they began.

gRPC's own channel credentials are fixed for a channel's life.
"""

import weakref
from collections.abc import Callable
from typing import Any

import grpc

from infermesh.security.certificates import Certificates, Material

_Stub = Callable[..., Any]


class RenewingChannel(grpc.aio.Channel):  # type: ignore[misc]  # grpc is untyped
    """Makes a channel whenever the certificates are new; create it inside the event loop."""

    def __init__(
        self, certificates: Certificates, make: Callable[[Material], grpc.aio.Channel]
    ) -> None:
        self._certificates = certificates
        self._make = make
        self._is_closed = False
        # Of each call the channel that it is on: one that nobody holds closes itself.
        self._held: weakref.WeakKeyDictionary[Any, grpc.aio.Channel] = weakref.WeakKeyDictionary()
        self._renew(certificates.current())

    def _renew(self, material: Material) -> None:
        self._material = material
        self._channel = self._make(material)
        self._stubs: dict[tuple[str, str], _Stub] = {}

    def _current(self) -> grpc.aio.Channel:
        material = self._certificates.current()
        if material is not self._material and not self._is_closed:
            self._renew(material)
        return self._channel

    def _callable(self, kind: str, method: str, *serializers: Any) -> _Stub:
        def call(*args: Any, **options: Any) -> Any:
            channel = self._current()
            stub = self._stubs.get((kind, method))
            if stub is None:
                stub = self._stubs[kind, method] = getattr(channel, kind)(method, *serializers)
            made = stub(*args, **options)
            self._held[made] = channel
            return made

        return call

    def unary_unary(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> _Stub:  # fmt: skip
        return self._callable("unary_unary", method, request_serializer, response_deserializer)

    def unary_stream(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> _Stub:  # fmt: skip
        return self._callable("unary_stream", method, request_serializer, response_deserializer)

    def stream_unary(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> _Stub:  # fmt: skip
        return self._callable("stream_unary", method, request_serializer, response_deserializer)

    def stream_stream(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> _Stub:  # fmt: skip
        return self._callable("stream_stream", method, request_serializer, response_deserializer)

    async def close(self, grace: float | None = None) -> None:
        """Ends the calls on every channel, the older ones among them."""
        self._is_closed = True
        for channel in {self._channel, *self._held.values()}:
            await channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._current().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._current().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._current().channel_ready()

    async def __aenter__(self) -> "RenewingChannel":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
