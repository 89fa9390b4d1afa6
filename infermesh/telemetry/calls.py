"""Rate, errors and duration of a gRPC server's calls, by method and code.

One count where a call begins and one where it ends: nothing per message of a stream.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from infermesh.rpc_handler import behaviour_of, with_behaviour
from infermesh.telemetry import metrics

_STARTED = metrics.counter(
    "grpc_server_started_total", "Calls begun at this gRPC server, streams among them.", ("method",)
)
_HANDLED = metrics.counter(
    "grpc_server_handled_total",
    "Calls ended at this gRPC server, by status code; a stream counts when it ends.",
    ("method", "code"),
)
_SECONDS = metrics.histogram(
    "grpc_server_handling_seconds",
    "From a call's arrival to its one answer; calls that are answered by a stream are left out.",
    ("method",),
)
_CODES: dict[int, str] = {code.value[0]: code.name for code in grpc.StatusCode}


class CallMetrics(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc is untyped
    """Counts calls; the outermost interceptor, so that it sees how they end."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        if handler is None:  # whatever a caller makes up is no label
            _STARTED.labels(metrics.OTHER).inc()
            _HANDLED.labels(metrics.OTHER, grpc.StatusCode.UNIMPLEMENTED.name).inc()
            return None
        is_timed = not handler.response_streaming
        return with_behaviour(handler, _counted(behaviour_of(handler), details.method, is_timed))


def _counted(
    inner: Callable[..., Awaitable[Any]], method: str, is_timed: bool
) -> Callable[..., Awaitable[Any]]:
    """`inner` is a coroutine function, also for streams: it writes to the context itself."""
    started, seconds = _STARTED.labels(method), _SECONDS.labels(method) if is_timed else None

    async def call(request: Any, context: Any) -> Any:
        started.inc()
        began_s = time.perf_counter()
        code = grpc.StatusCode.UNKNOWN.name
        try:
            answer = await inner(request, context)
            code = _code(context)
            return answer
        except grpc.aio.AbortError:
            code = _code(context)
            raise
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED.name
            raise
        finally:
            _HANDLED.labels(method, code).inc()
            if seconds is not None:
                seconds.observe(time.perf_counter() - began_s)

    return call


def _code(context: Any) -> str:
    """The status of an ended call: what it was aborted with, else gRPC's own number, 0 or none."""
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return str(code.name)
    return _CODES.get(code or 0, "UNKNOWN")
