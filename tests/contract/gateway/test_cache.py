"""What the gateway asks its cache, what it gives it, and that nothing gets worse by it."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from infermesh.errors import Internal
from infermesh.v1 import inference_service_pb2 as pb
from infermesh.v1 import sampling_pb2
from infermesh.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.contract.gateway.cached import CHAT, ask, post, running, said, stored
from tests.fake_cache import AGE_S, FakeCache
from tests.fake_stream import saying
from tests.gateway_process import Edge, make_replicas, running_gateway


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 59},
        {"stop": ["x"]},
        {"user": "someone"},
        {"seed": 4},
        {"messages": [{"role": "user", "content": "Hello"}]},
        {"presence_penalty": 0.5},
    ],
    ids=str,
)
async def test_one_changed_field_is_a_miss_though_all_texts_mean_the_same(
    cached: Edge, change: dict[str, Any]
) -> None:
    assert cached.cache is not None
    await stored(cached, ask())
    cached.cache.all_mean_the_same = True
    answer = await post(cached, {**ask(), **change})
    assert said(answer) == ("miss", "no_candidate")


@pytest.mark.parametrize("more", [{"n": 2}, {"logprobs": True}], ids=str)
async def test_choices_and_logprobs_keep_to_the_exact_tier(
    cached: Edge, more: dict[str, Any]
) -> None:
    assert cached.cache is not None
    await post(cached, ask(**more))
    (query,) = cached.cache.queries
    assert (query.traits.n, query.traits.wants_logprobs) == (more.get("n", 1), "logprobs" in more)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (ask(temperature=0.7), "sampling"),
        ({k: v for k, v in ask().items() if k != "temperature"}, "sampling"),
        ({"model": "tiny", "prompt": ["a", "b"], "temperature": 0}, "several_prompts"),
    ],
)
async def test_request_beyond_the_policy_bypasses_the_cache(
    cached: Edge, body: dict[str, Any], reason: str
) -> None:
    assert cached.cache is not None
    for _ in range(2):
        assert said(await post(cached, body)) == ("bypass", reason)
    assert cached.cache.queries == []
    assert cached.cache.entries == []


async def test_no_store_neither_reads_nor_keeps(cached: Edge) -> None:
    assert cached.cache is not None
    await stored(cached, ask())
    answer = await post(cached, ask(), **{"cache-control": "no-store"})
    assert said(answer) == ("bypass", "no_store")
    await post(cached, ask("Other"), **{"cache-control": "private, no-store"})
    await stored(cached, ask("Third"))
    assert [entry.text for entry in cached.cache.entries] == ["Hello", "Third"]


async def test_no_cache_computes_and_replaces_what_was_kept(cached: Edge) -> None:
    assert cached.cache is not None
    await stored(cached, ask())
    cached.replica.script = saying("fresh")
    answer = await stored(cached, ask(), **{"cache-control": "no-cache"})
    assert said(answer) == ("bypass", "no_cache")
    assert answer.json()["choices"][0]["message"]["content"] == "fresh"
    assert [entry.replace for entry in cached.cache.entries] == [False, True]
    assert len(cached.cache.queries) == 1  # of the first request


@pytest.mark.parametrize(
    ("directive", "outcome"),
    [(f"max-age={AGE_S}", "hit"), (f"max-age={AGE_S - 1}", "miss"), ("max-age=0", "bypass")],
)
async def test_max_age_refuses_older_answers(cached: Edge, directive: str, outcome: str) -> None:
    await stored(cached, ask())
    assert said(await post(cached, ask(), **{"cache-control": directive}))[0] == outcome


async def test_unfinished_and_failed_answers_are_not_kept(cached: Edge) -> None:
    assert cached.cache is not None
    cached.replica.fail_at = (4, Internal("no"))
    response = await cached.http.post(CHAT, json=ask("Fails"))
    assert response.status_code == 500
    cached.replica.fail_at = None
    cached.replica.gated = True
    stream = await cached.openai.chat.completions.create(**ask("Leaves", stream=True))
    await cached.replica.step(3)
    await anext(aiter(stream))
    await stream.close()
    await cached.replica.wait(lambda: cached.replica.num_streams == 0)
    cached.replica.gated = False
    await stored(cached, ask("Stays"))
    assert [entry.text for entry in cached.cache.entries] == ["Stays"]


async def test_answer_that_a_stop_string_ended_is_kept_up_to_there(cached: Edge) -> None:
    assert cached.cache is not None
    live = await stored(cached, ask(stop=["word 2"]))
    (entry,) = cached.cache.entries
    (choice,) = entry.answer.choices
    assert choice.finish_reason == sampling_pb2.FINISH_REASON_STOP
    assert len(choice.token_ids) == live.json()["usage"]["completion_tokens"]
    assert entry.answer.compute_seconds > 0


async def test_requests_that_share_a_generation_keep_once(eager: Edge) -> None:
    cache = eager.cache
    assert cache is not None
    eager.replica.gated = cache.holds_semantic = True
    first = asyncio.create_task(post(eager, ask()))
    await eager.replica.wait(lambda: eager.replica.num_streams == 1)
    second = asyncio.create_task(post(eager, ask()))
    await cache.wait(lambda: len(cache.cancelled) == 1)
    cache.holds_semantic = False
    cache.release()
    eager.replica.gated = False
    eager.replica._wake.set()
    answers = await asyncio.gather(first, second)
    assert [said(answer)[1] for answer in answers] == ["no_candidate", "in_flight"]
    await stored(eager, ask("Other"))
    assert [entry.text for entry in cache.entries] == ["Hello", "Other"]


async def test_an_answer_is_kept_with_the_mark_from_before_it_began(eager: Edge) -> None:
    cache = eager.cache
    assert cache is not None
    cache.mark = b"second"
    await stored(eager, ask("Refreshes the mark"))
    eager.replica.gated = cache.holds_semantic = True
    running = asyncio.create_task(post(eager, ask()))
    await eager.replica.wait(lambda: eager.replica.num_streams == 1)
    cache.mark = b"third"
    cache.holds_semantic = False
    cache.release()  # late: the generation has begun
    eager.replica.gated = False
    eager.replica._wake.set()
    assert said(await running)[0] == "miss"
    await cache.kept(2)
    await stored(eager, ask("Begins later"))
    assert [entry.mark for entry in cache.entries] == [b"first", b"second", b"third"]


async def test_an_answer_that_began_without_the_cache_is_not_kept(tmp_path: Path) -> None:
    async with running(tmp_path) as edge:
        cache = edge.cache
        await stored(edge, ask())
        await cache.kill()
        while said(await post(edge, ask("Begins without it")))[1] != "unavailable":
            pass  # the gateway has not seen the end of its streams yet
        edge.replica.gated = True
        task = asyncio.create_task(post(edge, ask("Ends with it")))
        await edge.replica.wait(lambda: edge.replica.num_streams == 1)
        await cache.start()
        edge.replica.gated = False
        edge.replica._wake.set()
        assert said(await task) == ("miss", "unavailable")
        while said(await post(edge, ask()))[0] != "hit":
            pass  # the gateway has not found it again yet
        await stored(edge, ask("Last"))
        texts = [entry.text for entry in cache.entries]
        assert "Ends with it" not in texts
        assert texts[-1] == "Last"


async def test_cache_that_hangs_is_a_miss_and_soon_left_alone(tmp_path: Path) -> None:
    async with running(tmp_path, cache_timeout_ms=20.0) as edge:
        edge.cache.hangs = True
        answers = [await post(edge, ask(f"Question {i}")) for i in range(4)]
        assert [said(answer) for answer in answers] == [
            *[("miss", "timeout")] * 3,
            ("miss", "unavailable"),
        ]
        assert len(edge.cache.queries) == 3


async def test_cache_that_dies_is_a_miss_and_found_again(tmp_path: Path) -> None:
    async with running(tmp_path) as edge:
        await stored(edge, ask())
        await edge.cache.kill()
        await edge.cache_usable(False)
        assert said(await post(edge, ask("Meanwhile"))) == ("miss", "unavailable")
        await edge.cache.start()
        await edge.cache_usable(True)
        assert said(await post(edge, ask())) == ("hit", "same_request")


async def test_lookup_in_flight_is_a_miss_when_the_cache_dies(cached: Edge) -> None:
    assert cached.cache is not None
    cached.cache.hangs = True
    asking = asyncio.create_task(post(cached, ask()))
    await cached.cache.wait(lambda: len(cached.cache.queries) == 1)
    cached.cache.break_lookups(Internal("gone"))
    assert said(await asking) == ("miss", "unavailable")


async def test_cache_that_was_never_there_is_a_miss(tmp_path: Path) -> None:
    nowhere = FakeCache(f"unix:{tmp_path}/nowhere.sock")
    async with running_gateway(
        tmp_path, make_replicas(tmp_path), wait=False, cache=nowhere, cache_starts=False
    ) as edge:
        await edge.routable(1)
        assert said(await post(edge, ask())) == ("miss", "unavailable")


async def test_gateway_without_a_cache_says_nothing_of_it(edge: Edge) -> None:
    answer = await edge.http.post(CHAT, json=ask())
    assert not [name for name in answer.headers if name.startswith("infermesh-cache")]


async def test_answer_of_another_shape_is_a_miss(cached: Edge) -> None:
    assert cached.cache is not None
    await stored(cached, ask())
    extra = cached.cache.entries[0].answer.choices.add(index=1, token_ids=[5])
    extra.finish_reason = sampling_pb2.FINISH_REASON_STOP
    assert said(await post(cached, ask())) == ("miss", "malformed")


async def test_client_leaving_during_a_lookup_gives_it_up(cached: Edge) -> None:
    assert cached.cache is not None
    cached.cache.hangs = True
    asking = asyncio.create_task(cached.http.post(CHAT, json=ask()))
    await cached.cache.wait(lambda: len(cached.cache.queries) == 1)
    asking.cancel()
    await cached.cache.wait(lambda: len(cached.cache.cancelled) == 1)
    await cached.service.pipeline.admission.idle()


async def test_grpc_has_the_same_hits_and_says_so_in_its_trailers(cached: Edge) -> None:
    await stored(cached, ask())
    request = pb.ChatRequest(
        model="tiny",
        messages=[pb.ChatMessage(**message) for message in ask()["messages"]],
        options=pb.GenerationOptions(
            sampling=sampling_pb2.SamplingParams(temperature=0),
            stop=sampling_pb2.StopConditions(max_tokens=60),
        ),
    )
    async with grpc.aio.insecure_channel(cached.grpc_address) as channel:
        stub = InferenceServiceStub(channel)
        call = stub.Chat(request)
        responses = [response async for response in call]
        trailers = dict(await call.trailing_metadata())
        assert (trailers["infermesh-cache"], trailers["infermesh-cache-entry"]) == (
            "hit",
            "entry-0",
        )
        assert responses[-1].usage.cached_prompt_tokens == responses[-1].usage.prompt_tokens
        refused = stub.Chat(request, metadata=(("cache-control", "no-store"),))
        assert [r async for r in refused]
        assert dict(await refused.trailing_metadata())["infermesh-cache"] == "bypass"


async def test_metrics_count_hits_by_tier(cached: Edge) -> None:
    await stored(cached, ask())
    await post(cached, ask())
    text = (await cached.http.get(f"{cached.admin_url}/metrics")).text
    hit = 'infermesh_cache_requests_total{outcome="hit",reason="same_request",tier="exact"}'
    assert hit in text
    assert 'infermesh_cache_wait_seconds_bucket{le="0.001",outcome="miss"}' in text
    assert "infermesh_cache_connected 1.0" in text


async def test_operator_reports_a_bad_hit_and_invalidates(cached: Edge) -> None:
    assert cached.cache is not None
    url = f"{cached.admin_url}/cache"
    bad = await cached.http.post(f"{url}/report-bad-hit", json={"entry_id": "entry-0"})
    assert bad.json() == {"entry_id": "entry-0", "newly_quarantined": True}
    none = await cached.http.post(f"{url}/report-bad-hit", json={"entry_id": "nothing"})
    assert none.status_code == 404
    done = await cached.http.post(f"{url}/invalidate", json={"model_id": "tiny", "dry_run": True})
    assert done.json() == {"num_entries": 2, "dry_run": True}
    assert cached.cache.invalidations[0].model_id == "tiny"
    for body in ({}, {"model_id": "a", "tenant": "b"}, {"all": False}, {"model_id": 3}):
        refused = await cached.http.post(f"{url}/invalidate", json=body)
        assert refused.status_code == 400
