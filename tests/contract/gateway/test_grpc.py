"""InferenceService over raw stubs: the same pipeline, the same errors."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from infermesh.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    MeshError,
    ModelNotFound,
    NumericalError,
    QueueFull,
    from_rpc_error,
)
from infermesh.v1 import inference_service_pb2 as pb
from infermesh.v1 import sampling_pb2
from infermesh.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.fake_stream import saying
from tests.gateway_process import Edge, make_replicas, running_gateway
from tests.tiny_tokenizer import byte_level

GREEDY = sampling_pb2.SamplingParams(temperature=0)


@pytest.fixture
async def stub(edge: Edge) -> AsyncIterator[InferenceServiceStub]:
    async with grpc.aio.insecure_channel(edge.grpc_address) as channel:
        yield InferenceServiceStub(channel)


def chat(**options: object) -> pb.ChatRequest:
    return pb.ChatRequest(
        model="tiny",
        messages=[pb.ChatMessage(role="user", content="Hello")],
        options=pb.GenerationOptions(**{"sampling": GREEDY, **options}),  # type: ignore[arg-type]
    )


async def failure(call: grpc.aio.UnaryStreamCall) -> MeshError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return from_rpc_error(caught.value)


async def test_chat_streams_the_text_of_the_http_api(
    edge: Edge, stub: InferenceServiceStub
) -> None:
    edge.replica.script = saying("Zażółć 😀 naïve")
    responses = [r async for r in stub.Chat(chat(return_token_ids=True))]
    text = "".join(choice.text for r in responses for choice in r.choices)
    whole = await edge.openai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], temperature=0
    )
    assert text == whole.choices[0].message.content == "Zażółć 😀 naïve"
    last = [choice for r in responses for choice in r.choices][-1]
    assert last.finish_reason == sampling_pb2.FINISH_REASON_STOP
    assert responses[-1].usage.completion_tokens == whole.usage.completion_tokens  # type: ignore[union-attr]
    assert not any(r.HasField("usage") for r in responses[:-1])
    ids = [i for r in responses for choice in r.choices for i in choice.token_ids]
    assert len(ids) == responses[-1].usage.completion_tokens


async def test_generate_takes_text_and_token_ids(edge: Edge, stub: InferenceServiceStub) -> None:
    ids = byte_level().encode("Hello world").ids
    options = pb.GenerationOptions(sampling=GREEDY, stop=sampling_pb2.StopConditions(max_tokens=4))
    texts = []
    for prompt in ({"text": "Hello world"}, {"token_ids": pb.TokenIds(ids=ids)}):
        request = pb.GenerateRequest(model="tiny", options=options, **prompt)  # type: ignore[arg-type]
        responses = [r async for r in stub.Generate(request)]
        texts.append("".join(choice.text for r in responses for choice in r.choices))
    assert texts[0] == texts[1] != ""
    assert [list(submit.prompt_token_ids) for submit in edge.replica.submits] == [ids, ids]


async def test_logprobs_carry_bytes(edge: Edge, stub: InferenceServiceStub) -> None:
    edge.replica.script = saying("Hi 𐌰")
    sampling = sampling_pb2.SamplingParams(temperature=0, top_logprobs=2)
    responses = [r async for r in stub.Chat(chat(sampling=sampling))]
    entries = [e for r in responses for choice in r.choices for e in choice.logprobs]
    assert b"".join(entry.token for entry in entries).decode() == "Hi 𐌰"
    assert all(len(entry.top) == 2 for entry in entries)


@pytest.mark.parametrize(
    ("request_", "kind", "words"),
    [
        (
            pb.ChatRequest(model="gpt-9", messages=[pb.ChatMessage(role="user")]),
            ModelNotFound,
            "gpt",
        ),
        (pb.ChatRequest(model="tiny"), InvalidRequest, "messages"),
        (chat(n=0), InvalidRequest, "n is 0"),
        (chat(sampling=sampling_pb2.SamplingParams(temperature=9)), InvalidRequest, "temperature"),
        (
            chat(stop=sampling_pb2.StopConditions(max_tokens=1000)),
            ContextLengthExceeded,
            "256 tokens",
        ),
    ],
)
async def test_refusal_is_the_same_error_as_over_http(
    stub: InferenceServiceStub, request_: pb.ChatRequest, kind: type[MeshError], words: str
) -> None:
    error = await failure(stub.Chat(request_))
    assert type(error) is kind
    assert words in error.message


async def test_refusal_of_the_scheduler_keeps_its_retry_time(
    edge: Edge, stub: InferenceServiceStub
) -> None:
    edge.replica.refusal = QueueFull("the queue is full", retry_after_s=2.5)
    error = await failure(stub.Chat(chat()))
    assert isinstance(error, QueueFull)
    assert error.retry_after_s == 2.5


async def test_failure_in_mid_stream_is_the_status(edge: Edge, stub: InferenceServiceStub) -> None:
    edge.replica.fail_at = (4, NumericalError("the logits are not finite"))
    assert isinstance(await failure(stub.Chat(chat())), NumericalError)


async def test_cancel_of_the_call_cancels_at_the_scheduler(
    edge: Edge, stub: InferenceServiceStub
) -> None:
    edge.replica.gated = True
    call = stub.Chat(chat(), metadata=(("x-request-id", "caller"),))
    assert dict(await call.initial_metadata())["x-request-id"] == "caller"
    await edge.replica.step(2)
    await call.read()
    call.cancel()
    await edge.replica.wait(lambda: edge.replica.cancelled == ["caller"])


async def test_deadline_travels_to_the_scheduler(edge: Edge, stub: InferenceServiceStub) -> None:
    [r async for r in stub.Chat(chat(), timeout=7)]
    # gRPC rounds what it puts on the wire up
    assert 5 < edge.replica.submits[0].remaining_deadline.ToTimedelta().total_seconds() < 7.2


async def test_tokens_are_counted_without_running(edge: Edge, stub: InferenceServiceStub) -> None:
    counted = await stub.CountTokens(pb.CountTokensRequest(model="tiny", text="Hello world"))
    assert list(counted.token_ids) == byte_level().encode("Hello world").ids
    messages = [pb.ChatMessage(role="user", content="Hello")]
    chatted = await stub.CountTokens(pb.CountTokensRequest(model="tiny", messages=messages))
    assert chatted.num_tokens > 2
    assert edge.replica.submits == []


async def test_models_are_listed_and_described(stub: InferenceServiceStub) -> None:
    (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
    assert (model.id, model.architecture, model.num_ready_replicas) == ("tiny", "llama", 1)
    assert (await stub.GetModel(pb.GetModelRequest(model="tiny"))).model == model
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetModel(pb.GetModelRequest(model="gpt-9"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_chat_without_a_limit_gets_the_default_one(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, make_replicas(tmp_path), default_max_tokens=7) as edge:
        async with grpc.aio.insecure_channel(edge.grpc_address) as channel:
            responses = [r async for r in InferenceServiceStub(channel).Chat(chat())]
        assert responses[-1].usage.completion_tokens == 7
