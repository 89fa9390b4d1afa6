"""The error table is complete and survives every trip over the wire."""

import grpc
import pytest

from infermesh import errors, rpc_status
from infermesh.v1 import errors_pb2 as pb

CLASSES = [cls for cls in errors.error_classes() if cls is not errors.Unavailable]


def test_every_wire_reason_has_one_class() -> None:
    reasons = {value for value in pb.ErrorReason.values() if value}
    assert reasons == set(errors.BY_REASON)
    assert len(CLASSES) == len(reasons)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_error_detail_round_trips(cls: type[errors.MeshError]) -> None:
    sent = cls("what went wrong", param="temperature", retry_after_s=1.5)
    read = errors.from_detail(errors.to_detail(sent))
    assert type(read) is cls
    assert (read.message, read.param, read.retry_after_s) == (
        "what went wrong",
        "temperature",
        1.5,
    )


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("rich", [True, False], ids=["rich", "bare host"])
def test_error_status_round_trips(
    cls: type[errors.MeshError], rich: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rich:
        monkeypatch.setattr(rpc_status, "status_pb2", None)
    sent = cls("no", retry_after_s=2.0, metadata={"epoch": "7"})
    metadata = grpc.aio.Metadata(*rpc_status.trailers(sent))
    failed = grpc.aio.AioRpcError(cls.grpc_code, grpc.aio.Metadata(), metadata, details="no")
    read = errors.from_rpc_error(failed)
    assert type(read) is cls
    assert read.retry_after_s == 2.0
    assert read.metadata["epoch"] == "7"


def test_every_class_names_a_client_or_server_status() -> None:
    for cls in CLASSES:
        assert 400 <= cls.http_status < 600
        assert cls.grpc_code not in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN)
        assert cls.openai_type


def test_as_mesh_error_finds_the_error_when_a_task_group_wrapped_it() -> None:
    group = ExceptionGroup(
        "tasks", [ValueError("x"), ExceptionGroup("in", [errors.QueueFull("q")])]
    )
    assert isinstance(errors.as_mesh_error(group), errors.QueueFull)


def test_as_mesh_error_hides_the_text_of_unknown_exceptions() -> None:
    error = errors.as_mesh_error(ValueError("a user's prompt"))
    assert type(error) is errors.Internal
    assert "prompt" not in error.message
