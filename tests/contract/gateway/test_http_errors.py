"""What is wrong is said in OpenAI's words, with the HTTP status that clients act on."""

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from infermesh.errors import (
    Draining,
    MeshError,
    ModelLoading,
    NumericalError,
    QueueFull,
)
from infermesh.v1 import scheduler_service_pb2 as pb
from tests.gateway_process import Edge, make_replicas, running_gateway

MESSAGES = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


async def refused(edge: Edge, body: dict[str, Any], path: str = "/v1/chat/completions") -> Any:
    """The error object of a refusal, its shape checked."""
    base: dict[str, Any] = {"model": "tiny"}
    if path == "/v1/chat/completions":
        base["messages"] = MESSAGES
    response = await edge.http.post(path, json={**base, **body})
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return {**error, "status": response.status_code, "headers": response.headers}


async def test_wrong_model_is_not_found(edge: Edge) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await edge.openai.chat.completions.create(model="gpt-9", messages=MESSAGES)  # type: ignore[arg-type]
    assert caught.value.code == "model_not_found"
    assert "gpt-9" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        await edge.openai.models.retrieve("org/gpt-9")


async def test_too_long_prompt_is_refused_with_the_numbers(edge: Edge) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 300}]}
    error = await refused(edge, long)
    assert (error["status"], error["code"]) == (400, "context_length_exceeded")
    assert "256 tokens" in error["message"]
    too_much = await refused(edge, {"max_tokens": 250})
    assert too_much["code"] == "context_length_exceeded"
    assert "250 in the completion" in too_much["message"]
    assert edge.replica.submits == []


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"temperature": 3}, "temperature", "between 0 and 2"),
        ({"temperature": -0.1}, "temperature", "-0.1"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"temperature": True}, "temperature", "True"),
        ({"top_p": 0}, "top_p", "above 0 and at most 1"),
        ({"top_k": -5}, "top_k", "-5"),
        ({"min_p": 2}, "min_p", "between 0 and 1"),
        ({"n": 0}, "n", "between 1 and 128"),
        ({"n": 1.5}, "n", "1.5"),
        ({"max_tokens": 0}, "max_tokens", "0"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "0"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "between 0 and 3"),
        ({"presence_penalty": 2.1}, "presence_penalty", "between -2 and 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias", "99999999"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "between -100 and 100"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "-1"),
        ({"stop": ["a"] * 17}, "stop", "17"),
        ({"stop": [""]}, "stop", "0 characters"),
        ({"stop": 5}, "stop", "5"),
        ({"seed": 2**70}, "seed", "seed"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "required"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"model": None}, "model", "required"),
        ({"priority": "urgent"}, "priority", "urgent"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ],
)
async def test_bad_value_is_refused_naming_field_value_and_range(
    edge: Edge, body: dict[str, Any], param: str, words: str
) -> None:
    error = await refused(edge, body)
    assert (error["status"], error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert param in error["message"]
    assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"store": True}, "store"),
        ({"guided_json": {}}, "guided_json"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [TOOL]}]},
            "messages[0].tool_calls",
        ),
    ],
)
async def test_known_but_unserved_input_is_refused_by_name(
    edge: Edge, body: dict[str, Any], param: str
) -> None:
    error = await refused(edge, body)
    assert (error["status"], error["code"]) == (400, "unsupported_parameter")
    assert error["param"] == param


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"prompt": "x", "suffix": "y"}, "suffix", "unsupported_parameter"),
        ({"prompt": "x", "best_of": 3}, "best_of", "unsupported_parameter"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, "logprobs", "unsupported_parameter"),
        ({"prompt": "x", "logprobs": 21}, "logprobs", "invalid_request"),
        ({"prompt": []}, "prompt", "invalid_request"),
        ({"prompt": ""}, "prompt", "invalid_request"),
        ({"prompt": [1, 999999]}, "prompt", "invalid_request"),
        ({"prompt": {"a": 1}}, "prompt", "invalid_request"),
        ({}, "prompt", "invalid_request"),
    ],
)
async def test_bad_completion_is_refused_by_name(
    edge: Edge, body: dict[str, Any], param: str, code: str
) -> None:
    error = await refused(edge, body, "/v1/completions")
    assert (error["status"], error["param"], error["code"]) == (400, param, code)


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"null", b"\xff", b'{"model": NaN}'])
async def test_malformed_json_is_a_bad_request(edge: Edge, content: bytes) -> None:
    response = await edge.http.post("/v1/chat/completions", content=content)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_unknown_path_and_wrong_method_have_openais_shape(edge: Edge) -> None:
    nowhere = await edge.http.post("/v1/nothing")
    assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (404, "not_found")
    wrong = await edge.http.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


async def test_unknown_field_is_ignored_and_named(edge: Edge) -> None:
    body = {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": 1,
        "zap": 1,
        "frob": 2,
        "bad\nname": 3,
    }
    for stream in (False, True):
        response = await edge.http.post("/v1/chat/completions", json={**body, "stream": stream})
        assert response.status_code == 200
        assert response.headers["infermesh-ignored-fields"] == "zap, frob"


async def test_body_over_the_limit_is_too_large(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, make_replicas(tmp_path), max_request_bytes=1024) as edge:

        async def pieces() -> Any:
            for _ in range(4):
                yield b" " * 512

        declared = await edge.http.post("/v1/completions", content=b" " * 2048)
        chunked = await edge.http.post("/v1/completions", content=pieces())
        for response in (declared, chunked):
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (QueueFull("the queue is full", retry_after_s=2.5), 429),
        (ModelLoading("still loading", retry_after_s=2.5), 503),
        (Draining("going down", retry_after_s=2.5), 503),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusal_of_the_scheduler_keeps_status_and_retry_after(
    edge: Edge, refusal: MeshError, status: int, stream: bool
) -> None:
    edge.replica.refusal = refusal
    error = await refused(edge, {"stream": stream})
    assert (error["status"], error["code"]) == (status, refusal.code)
    assert error["headers"]["retry-after"] == "3"
    assert error["headers"]["retry-after-ms"] == "2500"
    assert error["headers"]["x-request-id"]


async def test_failure_in_mid_stream_is_one_error_event_and_the_end(edge: Edge) -> None:
    edge.replica.fail_at = (4, NumericalError("the logits are not finite"))
    body = {"model": "tiny", "messages": MESSAGES, "stream": True}
    response = await edge.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    events = [line for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert '"code":"numerical_error"' in events[-1]
    assert "[DONE]" not in response.text
    stream = await edge.openai.chat.completions.create(
        model="tiny",
        messages=MESSAGES,  # type: ignore[arg-type]
        stream=True,
    )
    with pytest.raises(openai.APIError, match="not finite"):
        async for _ in stream:
            pass


async def test_failure_of_a_whole_answer_is_a_status(edge: Edge) -> None:
    edge.replica.fail_at = (4, NumericalError("the logits are not finite"))
    error = await refused(edge, {})
    assert (error["status"], error["code"]) == (500, "numerical_error")


async def test_loading_model_is_unavailable_and_says_when_to_retry(tmp_path: Path) -> None:
    replicas = make_replicas(tmp_path)
    replicas[0].state = pb.REPLICA_STATE_LOADING
    async with running_gateway(tmp_path, replicas, wait=False) as edge:
        async with asyncio.timeout(10):
            while edge.service.fleet.clients[0].view.state.value != "loading":
                await edge.service.fleet.changed(1.0)
        error = await refused(edge, {})
        assert (error["status"], error["code"]) == (503, "model_loading")
        assert error["headers"]["retry-after"]
        assert (await edge.http.get("/readyz")).status_code == 200


async def test_unreachable_replica_is_unavailable(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, make_replicas(tmp_path)) as edge:
        await edge.replica.kill()
        await edge.routable(0)
        error = await refused(edge, {})
        assert (error["status"], error["code"]) == (503, "replica_unavailable")
        await edge.replica.start()


async def test_request_beyond_the_limit_in_flight_is_refused(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, make_replicas(tmp_path), max_inflight_requests=1) as edge:
        edge.replica.gated = True
        stream = await edge.openai.chat.completions.create(
            model="tiny",
            messages=MESSAGES,  # type: ignore[arg-type]
            stream=True,
        )
        error = await refused(edge, {})
        assert (error["status"], error["code"]) == (429, "queue_full")
        assert error["headers"]["retry-after"] == "1"
        await stream.close()
        await edge.replica.wait(lambda: edge.replica.num_streams == 0)
        edge.replica.gated = False
        answer = await edge.http.post(
            "/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES}
        )
        assert answer.status_code == 200


async def test_alias_is_served_and_described(tmp_path: Path) -> None:
    async with running_gateway(
        tmp_path, make_replicas(tmp_path), model_aliases=("gpt-4o=tiny",)
    ) as edge:
        answer = await edge.openai.chat.completions.create(
            model="gpt-4o",
            messages=MESSAGES,  # type: ignore[arg-type]
            max_tokens=1,
        )
        assert answer.model == "tiny"
        assert (await edge.openai.models.retrieve("gpt-4o")).id == "gpt-4o"


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan"])
async def test_bad_timeout_header_is_refused(edge: Edge, value: str) -> None:
    response = await edge.http.post(
        "/v1/chat/completions",
        json={"model": "tiny", "messages": MESSAGES},
        headers={"x-request-timeout-s": value},
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-request-timeout-s"


@pytest.mark.parametrize(
    ("refusal", "advice"),
    [(QueueFull("full", retry_after_s=2.0), "true"), (NumericalError("NaN"), "false")],
)
async def test_refusal_says_whether_a_retry_can_help(
    edge: Edge, refusal: MeshError, advice: str
) -> None:
    edge.replica.refusal = refusal
    assert (await refused(edge, {}))["headers"]["x-should-retry"] == advice
