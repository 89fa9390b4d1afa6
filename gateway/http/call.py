"""What a request's headers say: its id, credential, trace, deadline; and its body, up to a size."""

import re
import time
import uuid

from starlette.requests import ClientDisconnect, Request

from gateway.idempotency import check_key
from gateway.request import Call, RequestId
from infermesh.errors import Cancelled, InvalidRequest, RequestTooLarge
from infermesh.telemetry import tracing

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TIMEOUT_HEADER = "x-request-timeout-s"
IDEMPOTENCY_KEY = "Idempotency-Key"
LAST_EVENT_ID = "Last-Event-ID"
# Of the answer to a request that was repeated.
RESUMED = "infermesh-resumed"
ORIGINAL_REQUEST_ID = "infermesh-original-request-id"


def draw_request_id(given: str | None) -> RequestId:
    """The client's own id where it is fit for logs and headers, else a new one."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return RequestId(given)
    return RequestId(uuid.uuid4().hex)


def call_of(request: Request, endpoint: str, *, whole: bool = False) -> Call:
    """The circumstances of a request, inside its server span; `whole` as Call has it.

    Raises:
        InvalidRequest: the timeout header is no positive number; the key is none.
    """
    return Call(
        request_id=request.state.request_id,
        endpoint=endpoint,
        credential=bearer(request.headers.get("authorization", "")),
        deadline=_deadline(request),
        traceparent=tracing.current_traceparent() or request.headers.get("traceparent", ""),
        cache_control=request.headers.get("cache-control", ""),
        whole=whole,
        idempotency_key=check_key(request.headers.get(IDEMPOTENCY_KEY), IDEMPOTENCY_KEY),
        resume_from=request.headers.get(LAST_EVENT_ID),
    )


def bearer(authorization: str) -> str | None:
    """The credential in an Authorization header or its gRPC metadata; None where there is none."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _deadline(request: Request) -> float | None:
    given = request.headers.get(_TIMEOUT_HEADER)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise InvalidRequest(
            f"{_TIMEOUT_HEADER} is {given[:40]!r}; it must be a number of seconds above 0",
            param=_TIMEOUT_HEADER,
        )
    return time.monotonic() + seconds


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        RequestTooLarge: it is longer than allowed; found out without reading all of it.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > max_bytes:
                raise _too_large(max_bytes)
            parts.append(part)
    except ClientDisconnect:
        raise Cancelled("the client went away before its body had come") from None
    return b"".join(parts)


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body is larger than {max_bytes} bytes")
