"""A gRPC method's handler, taken apart and put together again by those who stand around it."""

from collections.abc import Callable
from typing import Any

import grpc


def behaviour_of(handler: grpc.RpcMethodHandler) -> Callable[..., Any]:
    """What answers a call; for streams of answers that is a generator, or writes them itself."""
    found: Callable[..., Any] = getattr(handler, _kind(handler))
    return found


def with_behaviour(
    handler: grpc.RpcMethodHandler, behaviour: Callable[..., Any]
) -> grpc.RpcMethodHandler:
    """The same method, answered by something else."""
    make = getattr(grpc, f"{_kind(handler)}_rpc_method_handler")
    return make(behaviour, handler.request_deserializer, handler.response_serializer)


def _kind(handler: grpc.RpcMethodHandler) -> str:
    asked, answered = (
        "stream" if streams else "unary"
        for streams in (handler.request_streaming, handler.response_streaming)
    )
    return f"{asked}_{answered}"
