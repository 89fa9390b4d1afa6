"""Failures as OpenAI writes them: `{"error": {message, type, param, code}}`, with Retry-After."""

import math
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from gateway.auth.headers import PREFIX
from infermesh.errors import MeshError, RateLimitExceeded, as_mesh_error
from infermesh.telemetry import logs

_log = logs.get(__name__)


def error_json(error: MeshError) -> dict[str, Any]:
    """The error object with its wrapper."""
    return {
        "error": {
            "message": error.message,
            "type": error.openai_type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_event(error: MeshError) -> bytes:
    """The last event of a stream that failed."""
    return b"data: " + orjson.dumps(error_json(error)) + b"\n\n"


def error_headers(error: MeshError) -> dict[str, str]:
    """The rate limits; whether and when to come back, in whole seconds and, for who knows it, in
    milliseconds.

    Official SDKs repeat every 5xx unless `x-should-retry` says that it is pointless.
    """
    headers = {name: value for name, value in error.metadata.items() if name.startswith(PREFIX)}
    # a rate limit that names no time is one that the request alone passes
    hopeless = isinstance(error, RateLimitExceeded) and error.retry_after_s is None
    headers["x-should-retry"] = "true" if error.retryable and not hopeless else "false"
    if error.retry_after_s is None:
        return headers
    return {
        **headers,
        "retry-after": str(max(1, math.ceil(error.retry_after_s))),
        "retry-after-ms": str(max(1, round(error.retry_after_s * 1e3))),
    }


def error_response(error: MeshError) -> Response:
    """The answer to a request that was refused."""
    return Response(
        orjson.dumps(error_json(error)),
        status_code=error.http_status,
        headers=error_headers(error),
        media_type="application/json",
    )


async def on_mesh_error(request: Request, exc: Exception) -> Response:
    """Starlette's handler for what endpoints raise."""
    del request
    return error_response(as_mesh_error(exc))


async def on_http_exception(request: Request, exc: Exception) -> Response:
    """Unknown paths and wrong methods, in OpenAI's words."""
    assert isinstance(exc, HTTPException)
    what = {
        404: f"there is nothing at {request.url.path}",
        405: f"{request.method} is not allowed at {request.url.path}",
    }.get(exc.status_code, str(exc.detail))
    body = {
        "error": {
            "message": what,
            "type": "invalid_request_error",
            "param": None,
            "code": {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code),
        }
    }
    return Response(
        orjson.dumps(body),
        status_code=exc.status_code,
        headers=exc.headers,
        media_type="application/json",
    )


async def on_defect(request: Request, exc: Exception) -> Response:
    """Anything else is ours; the log has the trace, the client the request id."""
    _log.error("a handler failed", exc_info=exc, extra={"path": request.url.path})
    return error_response(as_mesh_error(exc))
