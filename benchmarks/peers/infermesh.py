"""infermesh itself, twice: the whole mesh through HTTP, and its engine alone, without the mesh."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import grpc

from benchmarks.load import Target
from benchmarks.local_mesh import ROOT, local_mesh, samples
from benchmarks.peers.driven_process import driven
from benchmarks.peers.model import model_directory
from benchmarks.peers.peer import PRECISIONS, HttpServer, Peer, Running
from infermesh.v1 import inference_service_pb2 as pb
from infermesh.v1.inference_service_pb2_grpc import InferenceServiceStub

# The float type, and how weights are quantized; as a user would ask for each precision.
SERVED = {
    "bf16": ("bfloat16", ""),
    "f32": ("float32", ""),
    "int8": ("auto", "int8"),
    "int4": ("auto", "int4"),
}
# Nothing is reused: every token of every request is computed.
NO_REUSE = ("--no-cache", "--set", "gateway.reuse_policy=never")


def set_up(precision: str) -> None:
    """The weights; the rest is this checkout."""
    model_directory()


@contextlib.contextmanager
def mesh_facts(precision: str) -> Iterator[dict[str, Any]]:
    """`infermesh up`, keys and quota included: its ready file's facts."""
    dtype, quantize = SERVED[precision]
    flags = ["--model", str(model_directory()), "--dtype", dtype, *NO_REUSE]
    flags += ["--quantize", quantize] if quantize else []
    with local_mesh(*flags) as facts:
        yield facts


def target_of(facts: dict[str, Any]) -> Target:
    """Where it is asked, and how."""
    return Target.of_mesh(facts, full_length=("ignore_eos",))


@contextlib.contextmanager
def whole_mesh(precision: str) -> Iterator[Running]:
    """Every service as a process of its own, asked through HTTP."""
    with mesh_facts(precision) as facts:
        yield HttpServer(target_of(facts), served_model(facts))


@contextlib.contextmanager
def engine_alone(precision: str) -> Iterator[Running]:
    """The loop of `drivers.engine_loop`."""
    arguments = (str(model_directory()), *SERVED[precision])
    command = (sys.executable, "-m", "benchmarks.peers.drivers.engine_loop", *arguments)
    with driven(command, ROOT) as loop:
        yield loop


def served_model(facts: dict[str, Any]) -> dict[str, Any]:
    """What the mesh says of its first model."""
    with grpc.insecure_channel(facts["grpc"]) as channel:
        request = pb.GetModelRequest(model=facts["models"][0])
        metadata = (("authorization", f"Bearer {facts['api_key']}"),)
        model = InferenceServiceStub(channel).GetModel(request, metadata=metadata).model
    shard = next(s["metrics"] for s in facts["services"] if s["name"].startswith("shard"))
    return {
        "dtype": model.dtype,
        "quantization": model.quantization,
        "weight_bytes": round(samples(shard)["shard_weight_bytes"]),
    }


MESH = Peer("infermesh", PRECISIONS, set_up, whole_mesh)
ENGINE = Peer("engine alone", PRECISIONS, set_up, engine_alone)
