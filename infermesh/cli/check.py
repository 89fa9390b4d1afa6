"""`infermesh check`: does a mesh answer? One chat call, and gRPC's health check."""

import time
from typing import Annotated

import grpc
import typer

from infermesh.cli.sse import list_models, stream_chat
from infermesh.errors import Internal, ModelLoading, Unavailable

_CALL_S = 10.0
_QUESTION = "Are you there? Answer in one word."
_MAX_TOKENS = 16


def check(
    url: Annotated[str, typer.Option(help="The gateway's HTTP.", envvar="INFERMESH_URL")],
    grpc_address: Annotated[
        str, typer.Option("--grpc", help="The gateway's gRPC, host:port; default: not asked.")
    ] = "",
    model: Annotated[str | None, typer.Option(help="Default: the gateway's first.")] = None,
    api_key: Annotated[
        str, typer.Option(help="Needed where the gateway has an auth.", envvar="INFERMESH_API_KEY")
    ] = "none",
    wait: Annotated[
        float, typer.Option(help="Seconds to wait for a model that is being loaded.")
    ] = 0.0,
) -> None:
    """See whether a mesh answers; exit status 0 where it does."""
    name = model or _first_model(url, api_key, wait)
    message = {"role": "user", "content": _QUESTION}
    options = {"temperature": 0.0, "max_tokens": _MAX_TOKENS}
    begun = time.monotonic()
    text = "".join(stream_chat(url, name, [message], api_key, **options))
    if not text:
        raise Internal(f"{name} at {url} answered with nothing")
    typer.echo(f"{name} answered in {time.monotonic() - begun:.2f} s: {text}")
    if grpc_address:
        typer.echo(f"gRPC at {grpc_address}: {_health(grpc_address)}")


def _first_model(url: str, api_key: str, wait_s: float) -> str:
    until = time.monotonic() + wait_s
    while True:
        served = list_models(url, api_key)
        if served:
            return served[0]
        if time.monotonic() >= until:
            raise ModelLoading(f"the mesh at {url} has no model ready yet")
        time.sleep(0.5)


def _health(address: str) -> str:
    """SERVING. Raises Unavailable where it is not."""
    try:
        from grpc_health.v1 import health_pb2, health_pb2_grpc
    except ImportError:
        raise Unavailable("--grpc needs the package grpcio-health-checking") from None
    try:
        with grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=_CALL_S)
    except grpc.RpcError as error:
        raise Unavailable(f"no gRPC health at {address}: {error.code().name}") from None
    word: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unavailable(f"gRPC at {address} is {word}")
    return word
