"""What names a request: equal for one question however it is asked, different for any other."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.grpc.translate import chat_from_pb
from gateway.http.dialects import parse_chat
from gateway.idempotency import body_digest, check_key, positions, resumable
from gateway.request import (
    Attribution,
    Conversation,
    GenerationRequest,
    Options,
    Priority,
    Sampling,
    StopRules,
)
from infermesh.errors import InvalidRequest, UnsupportedParameter
from infermesh.v1 import inference_service_pb2 as pb

REQUEST = GenerationRequest(
    "tiny", (Conversation(({"role": "user", "content": "Hello"},)),), Options(n=2)
)


def with_options(**changes: Any) -> GenerationRequest:
    options = dataclasses.replace(REQUEST.options, **changes)
    return dataclasses.replace(REQUEST, options=options)


def digest(request: GenerationRequest) -> bytes:
    return body_digest(request, "tiny")


SAMPLING = {
    "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.5, "presence_penalty": 0.5,
    "frequency_penalty": 0.5, "repetition_penalty": 1.5, "logit_bias": {3: 1.0}, "seed": 5,
    "top_logprobs": 2,
}  # fmt: skip
STOP = {"max_tokens": 5, "min_tokens": 5, "stop_token_ids": (5,), "ignore_eos": True}
OTHERS: dict[str, Any] = {
    "n": 3, "user": "ann", "stop_strings": ("x",), "fallback_max_tokens": 7,
}  # fmt: skip


def test_every_option_that_shapes_the_answer_shapes_the_digest() -> None:
    different = [REQUEST, dataclasses.replace(REQUEST, prompts=("Hello",))]
    different += [with_options(sampling=Sampling(**{k: v})) for k, v in SAMPLING.items()]
    different += [with_options(stop=StopRules(**{k: v})) for k, v in STOP.items()]
    different += [with_options(**{k: v}) for k, v in OTHERS.items()]
    assert len({digest(request) for request in different}) == len(different)
    assert {f.name for f in dataclasses.fields(Sampling)} == set(SAMPLING)
    assert {f.name for f in dataclasses.fields(StopRules)} == set(STOP)
    shapes_no_answer = {"priority", "attribution"}
    rest = {f.name for f in dataclasses.fields(Options)} - {"sampling", "stop"} - shapes_no_answer
    assert rest == set(OTHERS)


def test_what_changes_no_token_changes_no_digest() -> None:
    assert digest(with_options(priority=Priority.HIGH)) == digest(REQUEST)
    assert digest(with_options(attribution=Attribution("ann", {"team": "a"}))) == digest(REQUEST)
    asked, fallen_back = StopRules(max_tokens=7), {"fallback_max_tokens": 7}
    assert digest(with_options(stop=asked)) == digest(with_options(**fallen_back))


def test_http_and_grpc_clients_name_the_same_request() -> None:
    http = parse_chat(
        b'{"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0.7,'
        b'"top_p": 0.9, "max_completion_tokens": 9, "stop": "x", "n": 2, "logprobs": true,'
        b'"stream": true, "logit_bias": {"5": 0.1}}',
        None,
    ).request
    grpc = pb.ChatRequest(model="tiny", messages=[pb.ChatMessage(role="user", content="Hi")])
    options = grpc.options
    options.sampling.temperature, options.sampling.top_p = 0.7, 0.9
    options.sampling.top_logprobs, options.sampling.logit_bias[5] = 0, 0.1
    options.stop.max_tokens, options.n = 9, 2
    options.stop_strings.append("x")
    assert digest(http) == digest(chat_from_pb(grpc, None))


@given(
    st.text(max_size=8),
    st.text(min_size=1, max_size=8),
    st.text(max_size=8),
    st.text(min_size=1, max_size=8),
)
def test_names_are_equal_for_one_tenant_and_key_alone(a: str, b: str, c: str, d: str) -> None:
    one, two = (resumable(tenant, key, REQUEST, "tiny", 1e9) for tenant, key in ((a, b), (c, d)))
    assert one is not None
    assert two is not None
    assert (one.key == two.key) is ((a, b) == (c, d))
    assert (one.record_id == two.record_id) is ((a, b) == (c, d))


def test_usage_record_has_another_name_when_the_window_is_over() -> None:
    names = [resumable("acme", "key", REQUEST, "tiny", window_s) for window_s in (1e9, 1e8)]
    assert names[0] is not None
    assert names[1] is not None
    assert names[0].key == names[1].key
    assert names[0].record_id != names[1].record_id


def test_request_without_a_key_has_no_name() -> None:
    assert resumable("acme", "", REQUEST, "tiny", 30.0) is None


def test_several_prompts_are_refused() -> None:
    several = dataclasses.replace(REQUEST, prompts=("a", "b"))
    with pytest.raises(UnsupportedParameter, match="prompt has 2 entries"):
        resumable("acme", "key", several, "tiny", 30.0)


@given(st.text(max_size=300))
def test_key_is_taken_as_it_is_or_refused(key: str) -> None:
    if 1 <= len(key) <= 255 and key.isprintable():
        assert check_key(key, "Idempotency-Key") == key
    else:
        with pytest.raises(InvalidRequest, match="Idempotency-Key has"):
            check_key(key, "Idempotency-Key")
    assert check_key(None, "Idempotency-Key") == ""


@given(st.lists(st.integers(0, 10**8), min_size=1, max_size=4))
def test_positions_come_back_as_they_were_told(had: list[int]) -> None:
    told = ",".join(map(str, had))
    assert positions(told, "key", len(had), "Last-Event-ID") == tuple(had)
    for wrong in (len(had) + 1, len(had) - 1):
        with pytest.raises(InvalidRequest, match="Last-Event-ID"):
            positions(told, "key", wrong, "Last-Event-ID")
    with pytest.raises(InvalidRequest, match="needs an Idempotency-Key"):
        positions(told, "", len(had), "Last-Event-ID")
    assert positions(None, "", 3, "Last-Event-ID") == (0, 0, 0)
