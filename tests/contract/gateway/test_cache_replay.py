"""Hits of the cache are replayed as live answers: same shape, same text, nothing computed."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.contract.gateway.cached import (
    ask,
    merged,
    normal,
    post,
    running,
    said,
    stored,
    text_of,
    without_ids,
)
from tests.fake_cache import AGE_S, SIMILARITY
from tests.gateway_process import Edge


async def test_same_request_is_a_hit_that_no_replica_sees(cached: Edge) -> None:
    live = await stored(cached, ask())
    assert said(live) == ("miss", "no_candidate")
    hit = await post(cached, ask())
    assert said(hit) == ("hit", "same_request")
    assert hit.headers["infermesh-cache-age"] == str(AGE_S)
    assert hit.headers["infermesh-cache-entry"] == "entry-0"
    assert "infermesh-cache-similarity" not in hit.headers
    assert "cache;dur=" in hit.headers["infermesh-waterfall"]
    assert normal(hit.json()) == normal(live.json())
    usage = hit.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]
    assert len(cached.replica.submits) == 1


VARIANTS: list[dict[str, Any]] = [
    {},
    {"logprobs": True, "top_logprobs": 2},
    {"n": 2},
    {"stop": ["word 2"]},
    # holds back more than the first piece, and is no match in the end
    {"stop": [" word 0 of choice 0, word 1 of choice 0, word 2 of choice 1"]},
    {"max_tokens": 5},
    {"return_token_ids": True},
    {"stop": ["word 2"], "logprobs": True, "top_logprobs": 1},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_replay_has_the_shape_of_a_live_answer(
    cached: Edge, variant: dict[str, Any], stream: bool
) -> None:
    body = ask(**variant, stream=stream)
    if stream:
        body["stream_options"] = {"include_usage": True}
    live = await stored(cached, body)
    hit = await post(cached, body)
    assert said(hit)[0] == "hit"
    if not stream:
        assert normal(hit.json()) == normal(live.json())
        return
    assert merged(without_ids(hit.text)) == merged(without_ids(live.text))
    assert hit.text.rstrip().endswith("data: [DONE]")
    assert ": infermesh-waterfall" in hit.text


async def test_replay_comes_in_several_chunks(cached: Edge) -> None:
    await stored(cached, ask(stream=True))
    hit = await post(cached, ask(stream=True))
    assert said(hit)[0] == "hit"
    texts = [c for e in without_ids(hit.text) for c in e["choices"] if c["delta"].get("content")]
    assert 2 < len(texts) < 10


async def test_completions_are_replayed_too(cached: Edge) -> None:
    body = {"model": "tiny", "prompt": "Once upon", "temperature": 0, "logprobs": 1, "echo": False}
    live = await stored(cached, body)
    hit = await post(cached, body)
    assert said(hit) == ("hit", "same_request")
    assert normal(hit.json()) == normal(live.json())


async def test_streamed_and_whole_answers_share_an_entry(cached: Edge) -> None:
    live = await stored(cached, ask(stream=True))
    hit = await post(cached, ask())
    assert said(hit)[0] == "hit"
    assert hit.json()["choices"][0]["message"]["content"] == text_of(live)


async def test_similar_question_is_a_hit_in_the_head_start(cached: Edge) -> None:
    assert cached.cache is not None
    live = await stored(cached, ask("Hello there"))
    cached.cache.all_mean_the_same = True
    hit = await post(cached, ask("Hi there"), **{"x-request-id": "similar"})
    assert said(hit) == ("hit", "same_meaning")
    assert float(hit.headers["infermesh-cache-similarity"]) == SIMILARITY
    assert hit.json()["choices"] == live.json()["choices"]
    assert hit.json()["usage"]["prompt_tokens"] < live.json()["usage"]["prompt_tokens"]
    assert len(cached.replica.submits) == 1
    record = (await cached.http.get(f"{cached.admin_url}/debug/requests/similar")).json()
    assert record["cache"]["tier"] == "semantic"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_hit_after_the_head_start_ends_the_generation(eager: Edge, stream: bool) -> None:
    cache = eager.cache
    assert cache is not None
    live = await stored(eager, ask("Hello there"))
    cache.all_mean_the_same = cache.holds_semantic = True
    eager.replica.gated = True
    asking = asyncio.create_task(
        post(eager, ask("Hi there", stream=stream), **{"x-request-id": "similar"})
    )
    await eager.replica.wait(lambda: eager.replica.num_streams == 1)
    await eager.replica.step(2)
    await cache.wait(lambda: len(cache.queries) == 2)
    cache.release()
    hit = await asking
    assert said(hit) == ("hit", "same_meaning")
    text = text_of(hit) if stream else hit.json()["choices"][0]["message"]["content"]
    assert text == live.json()["choices"][0]["message"]["content"]
    await eager.replica.wait(lambda: eager.replica.cancelled == ["similar"])
    record = (await eager.http.get(f"{eager.admin_url}/debug/requests/similar")).json()
    assert all(ms >= 0 for ms in record["waterfall_ms"].values())


async def test_whole_answer_is_not_held_back_by_a_slow_lookup(eager: Edge) -> None:
    cache = eager.cache
    assert cache is not None
    cache.holds_semantic = True
    answer = await post(eager, ask())
    assert said(answer) == ("miss", "late")
    await cache.wait(lambda: len(cache.cancelled) == 1)


async def test_stream_is_held_back_no_longer_than_configured(tmp_path: Path) -> None:
    async with running(tmp_path, cache_head_start_ms=0.0, cache_hold_ms=1.0) as edge:
        edge.cache.holds_semantic = True
        answer = await post(edge, ask(stream=True))
        assert said(answer) == ("miss", "late")
        assert text_of(answer)
