"""Quantized demo models behind HTTP: they answer, take less memory, and say what they are."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator

import grpc
import pytest

from demo.corpus import held_out_exchanges
from demo.evaluation import EVALUATION_SEED
from infermesh.v1 import inference_service_pb2 as pb
from infermesh.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.e2e.mesh_process import DEMO_MODEL, INFERMESH, Mesh, environment

PLAIN_BYTES = 4 * 4_213_504  # float32
QUESTIONS = held_out_exchanges(EVALUATION_SEED + 1, 8)


@pytest.fixture(scope="module")
def int8_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("int8")
    with Mesh(folder, "--quantize", "int8", "--dtype", "float32", "--no-cache") as mesh:
        yield mesh


@pytest.fixture(scope="module")
def int4_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """One model quantized at load, beside its checkpoint as `infermesh quantize` wrote it."""
    folder = tmp_path_factory.mktemp("int4")
    out = folder / "checkpoint"
    command = [*INFERMESH, "quantize", str(DEMO_MODEL), "--out", str(out), "--scheme", "int4"]
    subprocess.run(command, cwd=folder, env=environment(folder), check=True, timeout=120)
    models = ["--model", f"asked={DEMO_MODEL}", "--model", f"stored={out}"]
    options = ["--quantize", "int4", "--dtype", "float32", "--no-cache"]
    with Mesh(folder, *models, *options) as mesh:
        yield mesh


async def answers(mesh: Mesh, model: str) -> list[str]:
    async with mesh.async_openai(max_retries=0) as client:

        async def ask(question: str) -> str:
            done = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=192,
            )
            return done.choices[0].message.content or ""

        return await asyncio.gather(*(ask(exchange.question) for exchange in QUESTIONS))


def num_right(given: list[str]) -> int:
    return sum(answer == exchange.answer for answer, exchange in zip(given, QUESTIONS, strict=True))


@pytest.mark.slow
async def test_int8_answers_nine_in_ten_from_a_third_of_the_memory(int8_mesh: Mesh) -> None:
    assert num_right(await answers(int8_mesh, int8_mesh.model)) >= 0.9 * len(QUESTIONS)
    # a byte per weight; the tied embedding, an eighth of them, is there twice
    weight_bytes = int8_mesh.metric("shard-0", "shard_weight_bytes")
    assert 0.25 < weight_bytes / PLAIN_BYTES < 0.3
    assert int8_mesh.openai().models.retrieve(int8_mesh.model).quantization == "int8"
    with grpc.insecure_channel(int8_mesh.facts["grpc"]) as channel:
        request = pb.GetModelRequest(model=int8_mesh.model)
        found = InferenceServiceStub(channel).GetModel(request, metadata=int8_mesh.bearer)
    assert found.model.quantization == "int8"


async def test_int4_answers_nine_in_ten_at_load_and_from_its_checkpoint(int4_mesh: Mesh) -> None:
    asked = await answers(int4_mesh, "asked")
    stored = await answers(int4_mesh, "stored")
    assert num_right(asked) >= 0.9 * len(QUESTIONS)
    assert asked == stored
    for shard in ("shard-0", "shard-1"):
        assert 0.15 < int4_mesh.metric(shard, "shard_weight_bytes") / PLAIN_BYTES < 0.21
    listed = {model.id: model.quantization for model in int4_mesh.openai().models.list()}
    assert listed == {"asked": "int4-g32", "stored": "int4-g32"}
