"""Completions and the endpoints around them, through the official client and raw HTTP."""

from typing import Any

import pytest

from tests.fake_stream import saying
from tests.gateway_process import Edge
from tests.tiny_tokenizer import byte_level, eos_id

ASK: dict[str, Any] = {"model": "tiny", "temperature": 0}


def ids(text: str) -> list[int]:
    found: list[int] = byte_level().encode(text).ids
    return found


async def test_text_and_token_ids_are_the_same_prompt(edge: Edge) -> None:
    by_text = await edge.openai.completions.create(**ASK, prompt="Hello world", max_tokens=5)
    by_ids = await edge.openai.completions.create(**ASK, prompt=ids("Hello world"), max_tokens=5)
    assert by_text.choices[0].text == by_ids.choices[0].text
    first, second = edge.replica.submits
    assert list(first.prompt_token_ids) == list(second.prompt_token_ids) == ids("Hello world")
    assert by_text.object == "text_completion"
    assert by_text.choices[0].finish_reason == "length"


async def test_default_limit_is_sixteen_tokens(edge: Edge) -> None:
    answer = await edge.openai.completions.create(**ASK, prompt="Hello")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize(
    "prompts", [["one", "two three"], [ids("one"), ids("two three")]], ids=["texts", "token ids"]
)
async def test_each_prompt_of_a_list_gets_its_choices(edge: Edge, prompts: list[Any]) -> None:
    edge.replica.script = lambda submit, choice: [
        *ids(f"{len(submit.prompt_token_ids)}/{choice}"),
        eos_id(),
    ]
    answer = await edge.openai.completions.create(**ASK, prompt=prompts, n=2)
    sizes = len(ids("one")), len(ids("two three"))
    assert [choice.text for choice in answer.choices] == [
        f"{size}/{index}" for size in sizes for index in range(2)
    ]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(sizes)


async def test_completion_streams_text_then_reason_then_usage(edge: Edge) -> None:
    stream = await edge.openai.completions.create(
        **ASK, prompt="Hello", max_tokens=6, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    whole = await edge.openai.completions.create(**ASK, prompt="Hello", max_tokens=6)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6


async def test_echo_puts_the_prompt_before_the_answer(edge: Edge) -> None:
    edge.replica.script = saying(" world")
    whole = await edge.openai.completions.create(**ASK, prompt=ids("Hello"), echo=True)
    assert whole.choices[0].text == "Hello world"
    stream = await edge.openai.completions.create(**ASK, prompt="Hello", echo=True, stream=True)
    assert "".join([c.choices[0].text async for c in stream if c.choices]) == "Hello world"


async def test_logprobs_have_the_older_shape(edge: Edge) -> None:
    edge.replica.script = saying("Hello world")
    answer = await edge.openai.completions.create(**ASK, prompt="Say", logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == "Hello world"
    assert logprobs.token_logprobs == [-0.5] * len(ids("Hello world"))
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[0] == 0
    assert all(len(top) == 2 for top in logprobs.top_logprobs or [])


async def test_models_are_listed_and_described(edge: Edge) -> None:
    listed = [model async for model in edge.openai.models.list()]
    assert [model.id for model in listed] == ["tiny"]
    model = await edge.openai.models.retrieve("tiny")
    assert (model.object, model.created, model.owned_by) == ("model", 1_700_000_000, "infermesh")


async def test_tokenize_and_detokenize_are_inverse(edge: Edge) -> None:
    text = "Zażółć 😀 naïve"
    tokens = (await edge.http.post("/tokenize", json={"prompt": text})).json()
    assert tokens["tokens"] == ids(text)
    assert tokens["count"] == len(ids(text))
    back = await edge.http.post("/detokenize", json={"model": "tiny", "tokens": tokens["tokens"]})
    assert back.json() == {"prompt": text}
    chat = await edge.http.post(
        "/tokenize", json={"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    )
    assert eos_id() in chat.json()["tokens"]


async def test_health_readiness_and_description_are_served(edge: Edge) -> None:
    assert (await edge.http.get("/healthz")).status_code == 200
    assert (await edge.http.get("/readyz")).status_code == 200
    described = (await edge.http.get("/openapi.json")).json()
    assert "/v1/chat/completions" in described["paths"]
    body = described["components"]["schemas"]["ChatBody"]["properties"]
    assert body["temperature"]["maximum"] == 2


async def test_prompt_that_met_a_stop_string_is_cancelled_while_others_go_on(edge: Edge) -> None:
    edge.replica.gated = True
    edge.replica.script = lambda submit, choice: ids(
        "STOP and more words" if list(submit.prompt_token_ids) == ids("one") else "x y z " * 9
    )
    stream = await edge.openai.completions.create(
        **ASK, prompt=["one", "two"], stop="STOP", stream=True
    )
    assert edge.replica.num_streams == 2
    await edge.replica.step(len(ids("STOP")))
    await edge.replica.wait(lambda: edge.replica.num_streams == 1)
    edge.replica.gated = False
    edge.replica._wake.set()
    reasons = [c.choices[0].finish_reason async for c in stream if c.choices]
    assert sorted(filter(None, reasons)) == ["length", "stop"]
