"""The one error tree, and the one table from each error to gRPC, HTTP and OpenAI's error types.

    MeshError
    ├── InvalidRequest ── UnsupportedParameter, ContextLengthExceeded, RequestTooLarge
    ├── NotFound ── ModelNotFound
    ├── AlreadyExists ── IdempotencyConflict
    ├── InvalidApiKey, PermissionDenied
    ├── QueueFull, DeadlineExceeded, Cancelled, SlowConsumer
    ├── RateLimitExceeded, InsufficientQuota
    ├── Unavailable ── ReplicaUnavailable, ModelLoading, Draining, AuthUnavailable
    ├── StaleEpoch, ProtocolViolation, IncompatibleVersion
    └── Internal ── UnsupportedModel, ModelLoadFailed, OutOfMemory, NumericalError, Poisoned

Services raise these; only interceptors and HTTP handlers translate them. Configuration errors are
not here: they never cross the wire (`infermesh.config.ConfigError`).
"""

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import ClassVar

import grpc

from infermesh.v1 import errors_pb2 as pb


class MeshError(Exception):
    """One failure with everything a client needs to know of it.

    Args:
        message: one sentence for a person, naming the field, the value and the allowed range.
        param: the request field at fault, as the client spelled it.
        retry_after_s: seconds after which a retry can succeed.
        metadata: further facts for machines, sent in ErrorInfo.
    """

    reason: ClassVar["pb.ErrorReason.ValueType"] = pb.ERROR_REASON_UNSPECIFIED
    grpc_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.metadata: dict[str, str] = dict(metadata or {})

    @property
    def code(self) -> str:
        """OpenAI's `error.code`: the reason in lower case."""
        return reason_name(self.reason).lower()


def reason_name(reason: "pb.ErrorReason.ValueType") -> str:
    """`QUEUE_FULL` for ERROR_REASON_QUEUE_FULL."""
    return pb.ErrorReason.Name(reason).removeprefix("ERROR_REASON_")


class InvalidRequest(MeshError):
    """The client's input is wrong; retrying it unchanged is pointless."""

    reason = pb.ERROR_REASON_INVALID_REQUEST
    grpc_code = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 400
    openai_type = "invalid_request_error"


class UnsupportedParameter(InvalidRequest):
    """A field that is known but not served."""

    reason = pb.ERROR_REASON_UNSUPPORTED_PARAMETER


class ContextLengthExceeded(InvalidRequest):
    """Prompt and requested output don't fit the model's context."""

    reason = pb.ERROR_REASON_CONTEXT_LENGTH_EXCEEDED


class RequestTooLarge(InvalidRequest):
    """The body is over the configured size."""

    reason = pb.ERROR_REASON_REQUEST_TOO_LARGE
    http_status = 413


class NotFound(MeshError):
    """There is no such thing."""

    reason = pb.ERROR_REASON_NOT_FOUND
    grpc_code = grpc.StatusCode.NOT_FOUND
    http_status = 404
    openai_type = "invalid_request_error"


class ModelNotFound(NotFound):
    """No model of that name is served here."""

    reason = pb.ERROR_REASON_MODEL_NOT_FOUND


class AlreadyExists(MeshError):
    """There is one of that name."""

    reason = pb.ERROR_REASON_ALREADY_EXISTS
    grpc_code = grpc.StatusCode.ALREADY_EXISTS
    http_status = 409
    openai_type = "invalid_request_error"


class IdempotencyConflict(AlreadyExists):
    """The idempotency key was used with another request."""

    reason = pb.ERROR_REASON_IDEMPOTENCY_CONFLICT


class InvalidApiKey(MeshError):
    """No credential, or one that is unknown, expired or revoked."""

    reason = pb.ERROR_REASON_INVALID_API_KEY
    grpc_code = grpc.StatusCode.UNAUTHENTICATED
    http_status = 401
    openai_type = "authentication_error"


class PermissionDenied(MeshError):
    """The credential is good, the act is not allowed to it."""

    reason = pb.ERROR_REASON_PERMISSION_DENIED
    grpc_code = grpc.StatusCode.PERMISSION_DENIED
    http_status = 403
    openai_type = "permission_error"


class QueueFull(MeshError):
    """The replica's queue is full; `retry_after_s` follows from its drain rate."""

    reason = pb.ERROR_REASON_QUEUE_FULL
    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429
    openai_type = "rate_limit_error"
    retryable = True


class RateLimitExceeded(MeshError):
    """The tenant's requests or tokens per minute, or its requests at once, are used up."""

    reason = pb.ERROR_REASON_RATE_LIMIT_EXCEEDED
    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429
    openai_type = "rate_limit_error"
    retryable = True


class InsufficientQuota(MeshError):
    """The tenant's tokens of the day or month are used up."""

    reason = pb.ERROR_REASON_INSUFFICIENT_QUOTA
    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429
    openai_type = "insufficient_quota"


class DeadlineExceeded(MeshError):
    """The time that the client allowed is over, or can't be met."""

    reason = pb.ERROR_REASON_DEADLINE_EXCEEDED
    grpc_code = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 504
    openai_type = "timeout_error"


class Cancelled(MeshError):
    """The client went away."""

    reason = pb.ERROR_REASON_CANCELLED
    grpc_code = grpc.StatusCode.CANCELLED
    http_status = 499
    openai_type = "invalid_request_error"


class SlowConsumer(MeshError):
    """The client reads slower than the model writes, beyond the bounded buffer."""

    reason = pb.ERROR_REASON_SLOW_CONSUMER
    grpc_code = grpc.StatusCode.ABORTED
    http_status = 408
    openai_type = "invalid_request_error"


class Unavailable(MeshError):
    """The mesh can't serve this now; a retry can succeed."""

    reason = pb.ERROR_REASON_REPLICA_UNAVAILABLE
    grpc_code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    openai_type = "server_error"
    retryable = True


class ReplicaUnavailable(Unavailable):
    """No replica that could serve this is reachable."""


class ModelLoading(Unavailable):
    """The model is being loaded."""

    reason = pb.ERROR_REASON_MODEL_LOADING


class Draining(Unavailable):
    """The server finishes what it has and takes nothing new."""

    reason = pb.ERROR_REASON_DRAINING


class AuthUnavailable(Unavailable):
    """A credential or quota can't be checked now."""

    reason = pb.ERROR_REASON_AUTH_UNAVAILABLE


class StaleEpoch(MeshError):
    """A newer epoch of the step stream is open; metadata `epoch` names it."""

    reason = pb.ERROR_REASON_STALE_EPOCH
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 500


class ProtocolViolation(MeshError):
    """A peer broke the wire contract."""

    reason = pb.ERROR_REASON_PROTOCOL_VIOLATION
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 500


class IncompatibleVersion(MeshError):
    """Caller and service speak no common protocol; the message says what to upgrade first."""

    reason = pb.ERROR_REASON_INCOMPATIBLE_VERSION
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 503


class Internal(MeshError):
    """A defect of ours."""

    reason = pb.ERROR_REASON_INTERNAL
    grpc_code = grpc.StatusCode.INTERNAL


class UnsupportedModel(Internal):
    """An architecture or checkpoint that would be served wrong, refused by name."""

    reason = pb.ERROR_REASON_UNSUPPORTED_MODEL
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION


class ModelLoadFailed(Internal):
    """Missing, torn or mismatched model files."""

    reason = pb.ERROR_REASON_MODEL_LOAD_FAILED
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION


class OutOfMemory(Internal):
    """The device can't hold it."""

    reason = pb.ERROR_REASON_OUT_OF_MEMORY
    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class NumericalError(Internal):
    """The model produced NaN or infinite logits for this request."""

    reason = pb.ERROR_REASON_NUMERICAL_ERROR


class Poisoned(Internal):
    """The request was in flight at too many crashes to be tried again."""

    reason = pb.ERROR_REASON_POISONED


def _tree(cls: type[MeshError]) -> Iterator[type[MeshError]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _tree(sub)


def error_classes() -> list[type[MeshError]]:
    """Every class of the tree below MeshError."""
    return list(_tree(MeshError))


# `Unavailable` groups; on the wire its reason means ReplicaUnavailable.
BY_REASON: dict["pb.ErrorReason.ValueType", type[MeshError]] = {
    cls.reason: cls for cls in error_classes() if cls is not Unavailable
}

# Where a peer's status carries no reason: it is not one of ours, or it never reached a server.
BY_GRPC_CODE: dict[grpc.StatusCode, type[MeshError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.UNAUTHENTICATED: InvalidApiKey,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: QueueFull,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAVAILABLE: ReplicaUnavailable,
}


def from_reason(
    reason: "pb.ErrorReason.ValueType",
    message: str,
    unknown: type[MeshError] = Internal,
    **facts: object,
) -> MeshError:
    """The error of a reason.

    Args:
        unknown: what a reason means that only a newer version knows.
    """
    cls = BY_REASON.get(reason, unknown)
    return cls(message, **facts)  # type: ignore[arg-type]  # facts are MeshError's keywords


def to_detail(error: MeshError) -> pb.ErrorDetail:
    """For a stream that lives on while one request in it fails."""
    detail = pb.ErrorDetail(reason=error.reason, message=error.message, param=error.param or "")
    if error.retry_after_s is not None:
        detail.retry_after.FromTimedelta(timedelta(seconds=error.retry_after_s))
    return detail


def from_detail(detail: pb.ErrorDetail, unknown: type[MeshError] = Internal) -> MeshError:
    """The inverse of `to_detail`; `unknown` as in `from_reason`."""
    return from_reason(
        detail.reason,
        detail.message,
        unknown,
        param=detail.param or None,
        retry_after_s=(
            detail.retry_after.ToTimedelta().total_seconds()
            if detail.HasField("retry_after")
            else None
        ),
    )


def as_mesh_error(exc: BaseException) -> MeshError:
    """Any exception as one of the tree.

    A TaskGroup's ExceptionGroup yields its first MeshError; what is unknown becomes Internal with
    the exception's type only, so that no prompt text leaks through a message.
    """
    if isinstance(exc, MeshError):
        return exc
    if isinstance(exc, BaseExceptionGroup):
        found = [as_mesh_error(inner) for inner in exc.exceptions]
        return next((e for e in found if type(e) is not Internal), found[0])
    if isinstance(exc, grpc.aio.AioRpcError):
        return from_rpc_error(exc)
    if isinstance(exc, TimeoutError):
        return DeadlineExceeded("the deadline of the call passed")
    return Internal(f"unexpected {type(exc).__name__}")


def from_rpc_error(exc: grpc.aio.AioRpcError) -> MeshError:
    """A failed call's status, with reason and details where the peer sent them."""
    from infermesh import rpc_status  # it builds on this module

    return rpc_status.from_rpc_error(exc)
