"""Errors on a call's status: google.rpc.Status details where the package is there, and always the
`infermesh-reason` trailer, so that a bare GPU host with grpcio alone understands and is understood.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import grpc

from infermesh import errors
from infermesh.v1 import errors_pb2 as pb

try:
    from google.rpc import error_details_pb2, status_pb2
except ImportError:  # a bare compute host: the trailer carries the same facts
    error_details_pb2 = status_pb2 = None

DOMAIN = "infermesh"
_DETAIL_TRAILER = "infermesh-error-bin"
_STATUS_TRAILER = "grpc-status-details-bin"

Trailers = tuple[tuple[str, str | bytes], ...]


def trailers(error: errors.MeshError) -> Trailers:
    """Trailing metadata that carries `error` beside the status code and message."""
    own: Trailers = ((_DETAIL_TRAILER, errors.to_detail(error).SerializeToString()),)
    own += tuple((f"infermesh-{key}", value) for key, value in error.metadata.items())
    if status_pb2 is None:
        return own
    return ((_STATUS_TRAILER, _rich_status(error).SerializeToString()), *own)


def _rich_status(error: errors.MeshError) -> Any:
    status = status_pb2.Status(code=error.grpc_code.value[0], message=error.message)
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(
            reason=errors.reason_name(error.reason), domain=DOMAIN, metadata=error.metadata
        )
    )
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromTimedelta(timedelta(seconds=error.retry_after_s))
        status.details.add().Pack(retry)
    if error.param is not None:
        bad = error_details_pb2.BadRequest()
        bad.field_violations.add(field=error.param, description=error.message)
        status.details.add().Pack(bad)
    if error.grpc_code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        quota = error_details_pb2.QuotaFailure()
        subject = error.metadata.get("tenant", "replica")
        quota.violations.add(subject=subject, description=error.message)
        status.details.add().Pack(quota)
    return status


def from_rpc_error(exc: grpc.aio.AioRpcError) -> errors.MeshError:
    """The MeshError that a peer raised, or the nearest one to a bare status code."""
    metadata: Sequence[tuple[str, Any]] = tuple(exc.trailing_metadata() or ())
    facts = {
        key.removeprefix("infermesh-"): value
        for key, value in metadata
        if isinstance(value, str) and key.startswith("infermesh-")
    }
    for key, value in metadata:
        if key == _DETAIL_TRAILER:
            detail = pb.ErrorDetail.FromString(value)
            error = errors.from_detail(detail, _by_code(exc))
            error.metadata.update(facts)
            return error
    return _by_code(exc)(exc.details() or f"the call failed with {exc.code().name}")


def _by_code(exc: grpc.aio.AioRpcError) -> type[errors.MeshError]:
    return errors.BY_GRPC_CODE.get(exc.code(), errors.Internal)
