"""Chat completions through the official client."""

from typing import Any

import pytest

from tests.fake_stream import saying
from tests.gateway_process import Edge
from tests.tiny_tokenizer import byte_level

ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello"}],
    "temperature": 0,
}
PROMPT = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("packs_tokens", [True, False])
async def test_chat_answers_whole(edge: Edge, packs_tokens: bool) -> None:
    edge.replica.packs_tokens = packs_tokens
    edge.replica.script = saying("Zażółć 😀 naïve")
    answer = await edge.openai.chat.completions.create(**ASK)
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    assert answer.choices[0].message.content == "Zażółć 😀 naïve"
    assert answer.choices[0].finish_reason == "stop"
    submit = edge.replica.submits[0]
    assert list(submit.prompt_token_ids) == byte_level().encode(PROMPT).ids
    assert submit.request_id in answer.id


async def test_usage_counts_every_token_and_the_cached_ones(edge: Edge) -> None:
    edge.replica.script = saying("Hello world")
    usage = (await edge.openai.chat.completions.create(**ASK)).usage
    assert usage is not None
    assert usage.prompt_tokens == len(byte_level().encode(PROMPT).ids)
    assert usage.completion_tokens == len(byte_level().encode("Hello world").ids) + 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 3


async def test_chat_streams_role_text_reason_and_usage_in_that_order(edge: Edge) -> None:
    edge.replica.script = saying("Zażółć 😀 naïve")
    stream = await edge.openai.chat.completions.create(
        **ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Zażółć 😀 naïve"
    assert [c.choices[0].finish_reason for c in chunks[:-1]].count("stop") == 1
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1


async def test_stream_has_no_usage_when_it_was_not_asked_for(edge: Edge) -> None:
    stream = await edge.openai.chat.completions.create(**ASK, stream=True, max_tokens=3)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_choices_are_separate_when_n_is_two(edge: Edge) -> None:
    whole = await edge.openai.chat.completions.create(**ASK, n=2, max_tokens=8)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16
    stream = await edge.openai.chat.completions.create(**ASK, n=2, max_tokens=8, stream=True)
    texts = {0: "", 1: ""}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert [choice.message.content for choice in whole.choices] == [texts[0], texts[1]]


async def test_logprobs_have_openais_shape(edge: Edge) -> None:
    edge.replica.script = saying("Hello 𐌰")
    answer = await edge.openai.chat.completions.create(**ASK, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    joined = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    assert joined.decode() == answer.choices[0].message.content == "Hello 𐌰"
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)
    assert logprobs.content[-1].token.startswith("bytes:")
    assert edge.replica.submits[0].sampling.top_logprobs == 2


async def test_logprobs_stream_with_their_text(edge: Edge) -> None:
    edge.replica.script = saying("Hello 𐌰")
    stream = await edge.openai.chat.completions.create(**ASK, logprobs=True, stream=True)
    joined = b""
    async for chunk in stream:
        logprobs = chunk.choices[0].logprobs
        for entry in (logprobs.content if logprobs else None) or []:
            joined += bytes(entry.bytes or [])
            assert entry.top_logprobs == []
    assert joined.decode() == "Hello 𐌰"


async def test_stop_string_across_tokens_cancels_at_the_scheduler(edge: Edge) -> None:
    edge.replica.gated = True
    stream = await edge.openai.chat.completions.create(
        **ASK,
        stop=["d 1 of", "never"],
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"x-request-id": "stopper"},
    )
    await edge.replica.step(60)
    text, reason, usage = "", None, None
    async for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason or reason
    assert text == " word 0 of choice 0, wor"
    assert reason == "stop"
    await edge.replica.wait(lambda: edge.replica.cancelled == [("stopper", 0)])
    counted = byte_level().encode(" word 0 of choice 0, word 1 of").ids
    assert usage is not None
    assert usage.completion_tokens <= len(counted) + 1  # tokens after the match are not billed


async def test_other_servers_fields_reach_the_scheduler(edge: Edge) -> None:
    await edge.openai.chat.completions.create(
        model="tiny",
        messages=ASK["messages"],
        max_completion_tokens=9,
        top_p=0.5,
        seed=-1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": -100},
        user="someone",
        extra_body={
            "ignore_eos": True,
            "min_tokens": 2,
            "top_k": -1,
            "min_p": 0.1,
            "repetition_penalty": 1.5,
            "stop_token_ids": [7],
            "priority": "high",
        },
    )
    submit = edge.replica.submits[0]
    sampling, stop = submit.sampling, submit.stop
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (
        0,
        pytest.approx(0.1),
        1.5,
    )
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.top_p, sampling.seed) == (0.5, 2**64 - 1)
    assert dict(sampling.logit_bias) == {5: -100}
    assert (stop.max_tokens, stop.min_tokens, stop.ignore_eos) == (9, 2, True)
    assert list(stop.stop_token_ids) == [7]
    assert submit.priority == 3
    assert submit.sharing_domain == "local/someone"


async def test_defaults_follow_the_generation_config(edge: Edge) -> None:
    edge.replica.generation_config_json = '{"temperature": 0.6, "top_k": 20, "top_p": 0.95}'
    edge.replica.fingerprint = "another"
    await edge.replica.kill()
    await edge.routable(0)
    await edge.replica.start()
    await edge.routable(1)
    await edge.openai.chat.completions.create(
        model="tiny", messages=ASK["messages"], top_p=0.5, max_tokens=2
    )
    sampling = edge.replica.submits[0].sampling
    assert (round(sampling.temperature, 3), sampling.top_k, sampling.top_p) == (0.6, 20, 0.5)
    assert sampling.HasField("seed")


async def test_content_parts_are_joined_and_developer_becomes_system(edge: Edge) -> None:
    await edge.openai.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "Be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
            },
        ],
        max_tokens=1,
    )
    rendered = byte_level().decode(
        list(edge.replica.submits[0].prompt_token_ids), skip_special_tokens=False
    )
    assert "<|im_start|>system\nBe brief" in rendered
    assert "<|im_start|>user\none\ntwo<|im_end|>" in rendered


async def test_chat_may_fill_the_context_when_no_limit_is_given(edge: Edge) -> None:
    await edge.openai.chat.completions.create(**ASK)
    submit = edge.replica.submits[0]
    assert submit.stop.max_tokens == 256 - len(submit.prompt_token_ids)
