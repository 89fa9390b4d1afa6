"""gRPC clients get the same answer as HTTP clients, from the same pipeline."""

import grpc
import pytest

from infermesh import Client
from infermesh.errors import InvalidRequest, ModelNotFound
from infermesh.v1 import inference_service_pb2 as pb
from infermesh.v1 import inference_service_pb2_grpc as pb_grpc
from infermesh.v1 import sampling_pb2
from tests.e2e.mesh_process import Mesh

QUESTION = "What is the capital of France?"


def over_http(mesh: Mesh) -> str:
    message = {"role": "user", "content": QUESTION}
    answer = mesh.openai().chat.completions.create(
        model=mesh.model, messages=[message], temperature=0
    )
    return answer.choices[0].message.content


def test_client_streams_the_answer_of_the_http_api(demo_mesh: Mesh) -> None:
    with Client(demo_mesh.facts["grpc"], demo_mesh.facts["api_key"]) as client:
        text = "".join(delta.text for delta in client.chat(QUESTION, temperature=0))
        assert client.usage is not None
        assert client.usage.completion_tokens > 0
    assert text == over_http(demo_mesh)


def test_raw_stubs_stream_the_answer_of_the_http_api(demo_mesh: Mesh) -> None:
    with grpc.insecure_channel(demo_mesh.facts["grpc"]) as channel:
        request = pb.ChatRequest(
            model=demo_mesh.model,
            messages=[pb.ChatMessage(role="user", content=QUESTION)],
            options=pb.GenerationOptions(sampling=sampling_pb2.SamplingParams(temperature=0)),
        )
        responses = pb_grpc.InferenceServiceStub(channel).Chat(
            request, timeout=60, metadata=demo_mesh.bearer
        )
        text = "".join(choice.text for r in responses for choice in r.choices)
    assert text == over_http(demo_mesh)


def test_client_raises_the_mesh_error_when_the_gateway_refuses(demo_mesh: Mesh) -> None:
    with Client(demo_mesh.facts["grpc"], demo_mesh.facts["api_key"]) as client:
        with pytest.raises(ModelNotFound, match="gpt-9"):
            next(client.chat(QUESTION, model="gpt-9"))
        with pytest.raises(InvalidRequest, match="temperature"):
            next(client.chat(QUESTION, temperature=9.0))


def test_client_counts_tokens_and_lists_models(demo_mesh: Mesh) -> None:
    with Client(demo_mesh.facts["grpc"], demo_mesh.facts["api_key"]) as client:
        assert client.models() == [demo_mesh.model]
        assert 1 <= client.count_tokens("What is a token?") <= 16


def test_client_gives_logprobs_when_asked(demo_mesh: Mesh) -> None:
    with Client(demo_mesh.facts["grpc"], demo_mesh.facts["api_key"]) as client:
        deltas = list(client.chat(QUESTION, temperature=0, top_logprobs=2))
    entries = [entry for delta in deltas for entry in delta.logprobs]
    assert b"".join(entry.token for entry in entries).decode() == over_http(demo_mesh)
    assert all(len(entry.top) == 2 and entry.top[0].logprob == entry.logprob for entry in entries)
