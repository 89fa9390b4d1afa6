"""A gRPC channel that follows its certificates: each new call goes over a connection that was made
with the current ones, and calls under way end where they began.

gRPC's own channel credentials are fixed for a channel's life.
"""

from collections.abc import Callable
from typing import Any

import grpc

from infermesh.security.certificates import Certificates, Material

_Stub = Callable[..., Any]


class _Generation:
    """A channel of one set of certificates, and how many calls are open on it."""

    def __init__(self, channel: grpc.aio.Channel, material: Material) -> None:
        self.channel: grpc.aio.Channel | None = channel
        self.material = material
        self._stubs: dict[tuple[str, str], _Stub] = {}
        self._num_open = 0
        self._is_current = True

    def call(self, kind: str, method: str, serializers: Any, args: Any, options: Any) -> Any:
        stub = self._stubs.get((kind, method))
        if stub is None:
            stub = self._stubs[kind, method] = getattr(self.channel, kind)(method, *serializers)
        made = stub(*args, **options)
        self._num_open += 1
        made.add_done_callback(self._on_end)
        return made

    def retire(self) -> None:
        """No call comes any more; the last one's end is the channel's."""
        self._is_current = False
        self._drop_if_idle()

    def _on_end(self, _: Any) -> None:
        self._num_open -= 1
        self._drop_if_idle()

    def _drop_if_idle(self) -> None:
        if self._num_open == 0 and not self._is_current:
            self._stubs.clear()
            self.channel = None  # one that nobody holds closes itself


class RenewingChannel(grpc.aio.Channel):  # type: ignore[misc]  # grpc is untyped
    """Makes a channel whenever the certificates are new; create it inside the event loop."""

    def __init__(
        self, certificates: Certificates, make: Callable[[Material], grpc.aio.Channel]
    ) -> None:
        self._certificates = certificates
        self._make = make
        self._older: list[_Generation] = []
        self._is_closed = False
        material = certificates.current()
        self._newest = _Generation(make(material), material)

    def _current(self) -> _Generation:
        material = self._certificates.current()
        if material is not self._newest.material and not self._is_closed:
            older = [*self._older, self._newest]
            self._newest.retire()
            self._newest = _Generation(self._make(material), material)
            self._older = [one for one in older if one.channel is not None]
        return self._newest

    def _callable(self, kind: str, method: str, *serializers: Any) -> _Stub:
        def call(*args: Any, **options: Any) -> Any:
            return self._current().call(kind, method, serializers, args, options)

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
        for generation in (*self._older, self._newest):
            if generation.channel is not None:
                await generation.channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel().channel_ready()

    def _channel(self) -> grpc.aio.Channel:
        channel = self._current().channel
        assert channel is not None  # the newest is kept
        return channel

    async def __aenter__(self) -> "RenewingChannel":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
