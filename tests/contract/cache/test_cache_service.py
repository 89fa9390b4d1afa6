"""The real servicer with the real embedder over a unix socket."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from infermesh import rpc
from infermesh.errors import (
    Draining,
    InvalidRequest,
    ModelLoading,
    NotFound,
    ProtocolViolation,
)
from infermesh.v1 import sampling_pb2
from infermesh.v1 import semantic_cache_admin_service_pb2 as admin_pb
from infermesh.v1 import semantic_cache_service_pb2 as pb
from services.cache.minilm import MiniLm
from services.cache.server import SERVICE_NAME
from tests.contract.cache.harness import (
    answer,
    config,
    entry,
    error_of,
    names,
    query,
    serving,
)
from tests.unit.cache.embedders import WordEmbedder

FRANCE = "What is the capital of France?"


async def test_lookup_finds_the_same_and_the_reworded_and_refuses_the_opposite(
    tmp_path: Path, embedder: MiniLm
) -> None:
    async with serving(config(tmp_path), load_embedder=lambda: embedder) as (_, client):
        await client.ready()
        stored = await client.store(
            entry(FRANCE, answer=answer([5, 6, 7])),
            entry("Is it safe to eat raw eggs?"),
            entry("How do I get from Paris to London by train?"),
            entry("What is 17 x 23?"),
        )
        assert stored == {"STORED": 4}
        await client.indexed(4)
        asked = {
            FRANCE: ("HIT_EXACT", "SAME_REQUEST"),
            "Tell me the capital of France": ("HIT_SEMANTIC", "SAME_MEANING"),
            "Can you please tell me what the capital of France is?": (
                "HIT_SEMANTIC",
                "SAME_MEANING",
            ),
            "Is it unsafe to eat raw eggs?": ("MISS", "ANTONYMS"),
            "How do I get from London to Paris by train?": ("MISS", "ROLES_DIFFER"),
            "What is 17 x 24?": ("MISS", "NUMBERS_DIFFER"),
            "What is the capital of Spain?": ("MISS", "NAMES_DIFFER"),
        }
        found = await client.look_up(*(query(i, text) for i, text in enumerate(asked)))
        assert [names(one) for one in found] == list(asked.values())
        assert [list(one.answer.choices[0].token_ids) for one in found[:3]] == [[5, 6, 7]] * 3
        assert len({one.entry_id for one in found[:3]}) == 1
        assert found[1].similarity > 0.95
        assert found[3].similarity > 0.95, "the guard was not needed"
        assert found[3].entry_id == ""
        other = await client.look_up(query(1, FRANCE, domain="globex"))
        assert names(other[0]) == ("MISS", "NO_CANDIDATE")


async def test_exact_tier_answers_while_the_embedder_loads(tmp_path: Path) -> None:
    embedder = WordEmbedder()
    embedder.hold()

    def load() -> WordEmbedder:
        assert embedder.is_open.wait(30)
        return embedder

    async with serving(config(tmp_path), load_embedder=load) as (_, client):
        await client.store(entry(FRANCE))
        found = await client.look_up(query(1, FRANCE), query(2, "what is the capital of france"))
        assert [names(one) for one in found] == [
            ("HIT_EXACT", "SAME_REQUEST"),
            ("MISS", "EMBEDDER_LOADING"),
        ]
        request = pb.SemanticCacheServiceEmbedRequest(texts=["a"])
        error = await error_of(client.cache.Embed(request))
        assert isinstance(error, ModelLoading)
        assert error.retry_after_s
        facts = await client.cache.GetEmbedder(pb.GetEmbedderRequest())
        assert (facts.state, facts.model_id) == (pb.EMBEDDER_STATE_LOADING, "all-MiniLM-L6-v2")
        embedder.release()
        assert (await client.ready()).state == pb.EMBEDDER_STATE_READY
        await client.indexed(1)


async def test_every_entry_is_found_by_meaning_when_batches_are_small(tmp_path: Path) -> None:
    embedder = WordEmbedder()
    embedder.hold()

    def load() -> WordEmbedder:
        assert embedder.is_open.wait(30)
        return embedder

    options = config(tmp_path, lookup_max_batch=2)
    async with serving(options, load_embedder=load) as (_, client):
        await client.store(*(entry(f"What is item {number}?") for number in range(20)))
        embedder.release()
        await client.ready()
        await client.indexed(20)


async def test_lookup_is_a_miss_within_the_deadline_when_the_embedder_hangs(
    tmp_path: Path,
) -> None:
    embedder = WordEmbedder()
    options = config(tmp_path, lookup_deadline_ms=50.0)
    async with serving(options, load_embedder=lambda: embedder) as (_, client):
        await client.ready()
        await client.store(entry(FRANCE))
        embedder.hold()
        found = await client.look_up(query(1, "what is the capital of peru"), query(2, FRANCE))
        assert [names(one) for one in found] == [
            ("MISS", "DEADLINE"),
            ("HIT_EXACT", "SAME_REQUEST"),
        ]
        embedder.release()


async def test_entries_are_back_when_the_service_was_killed(
    tmp_path: Path, embedder: MiniLm
) -> None:
    """kill -9 leaves what `Store` has returned for: read here beside the running service."""
    options = config(tmp_path, data_dir=str(tmp_path / "data"))
    async with serving(options, load_embedder=lambda: embedder) as (_, client):
        await client.ready()
        await client.store(entry(FRANCE), entry("What is a mutex?"))
        await client.indexed(2)
        await asyncio.to_thread(shutil.copytree, tmp_path / "data", tmp_path / "after-kill")
    again = config(tmp_path, data_dir=str(tmp_path / "after-kill"))
    async with serving(again, load_embedder=lambda: embedder) as (_, client):
        exact = await client.look_up(query(1, FRANCE))
        assert names(exact[0])[0] == "HIT_EXACT"
        await client.ready()
        near = await client.look_up(query(1, "Tell me the capital of France"))
        assert names(near[0])[0] == "HIT_SEMANTIC"
        assert near[0].entry_id == exact[0].entry_id


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({}, "STORED"),
        ({"finish_reason": sampling_pb2.FINISH_REASON_LENGTH}, "STORED"),
        ({"finish_reason": sampling_pb2.FINISH_REASON_CANCELLED}, "INCOMPLETE"),
        ({"finish_reason": sampling_pb2.FINISH_REASON_ERROR}, "INCOMPLETE"),
        ({"finish_reason": sampling_pb2.FINISH_REASON_UNSPECIFIED}, "INCOMPLETE"),
        ({"token_ids": []}, "INCOMPLETE"),
        ({"logprobs": [sampling_pb2.TokenLogprobs(logprob=-1.0)]}, "MALFORMED"),
    ],
)
async def test_store_keeps_an_answer_only_when_it_is_whole(
    tmp_path: Path, change: dict[str, Any], outcome: str
) -> None:
    fields = {
        "token_ids": [1, 2],
        "finish_reason": sampling_pb2.FINISH_REASON_STOP,
        **change,
    }
    offered = pb.Answer(choices=[pb.AnswerChoice(**fields)])
    async with serving(config(tmp_path, embedder="none")) as (_, client):
        assert await client.store(entry(FRANCE, answer=offered)) == {outcome: 1}


async def test_store_refuses_what_has_no_fingerprint_or_no_choice(tmp_path: Path) -> None:
    async with serving(config(tmp_path, embedder="none")) as (_, client):
        assert await client.store(entry(FRANCE, exact_fingerprint=b"short")) == {"MALFORMED": 1}
        assert await client.store(entry(FRANCE, answer=pb.Answer())) == {"INCOMPLETE": 1}


async def test_store_changes_nothing_when_it_is_repeated(tmp_path: Path) -> None:
    async with serving(config(tmp_path, embedder="none")) as (_, client):
        first = entry(FRANCE, answer=answer([1]))
        again = entry(FRANCE, answer=answer([2]))
        assert await client.store(first, first, again) == {"STORED": 1, "DUPLICATE": 2}
        found = await client.look_up(query(1, FRANCE))
        assert list(found[0].answer.choices[0].token_ids) == [1]
        assert found[0].answer == first.answer


async def test_lookup_ends_as_a_protocol_violation_when_a_fingerprint_is_short(
    tmp_path: Path,
) -> None:
    async with serving(config(tmp_path, embedder="none")) as (_, client):
        error = await error_of(client.look_up(query(1, FRANCE, exact_fingerprint=b"short")))
        assert isinstance(error, ProtocolViolation)


async def test_a_cancelled_lookup_gets_no_answer_and_the_call_goes_on(tmp_path: Path) -> None:
    embedder = WordEmbedder()
    async with serving(config(tmp_path), load_embedder=lambda: embedder) as (_, client):
        await client.ready()
        await client.store(entry(FRANCE))
        embedder.hold()
        call = client.cache.Lookup(timeout=30)
        await call.write(pb.LookupRequest(query=query(7, "what is the capital of peru")))
        await call.write(pb.LookupRequest(cancel=pb.CancelLookup(lookup_id=7)))
        await call.write(pb.LookupRequest(query=query(7, FRANCE)))  # the id is free again
        response = await call.read()
        assert (response.lookup_id, names(response)[0]) == (7, "HIT_EXACT")
        embedder.release()
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


async def test_lookups_open_beyond_the_bound_are_misses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.cache.session.MAX_OPEN", 2)
    embedder = WordEmbedder()
    options = config(tmp_path, lookup_deadline_ms=300.0)
    async with serving(options, load_embedder=lambda: embedder) as (_, client):
        await client.ready()
        await client.store(entry(FRANCE))
        embedder.hold()
        asked = [query(i, f"what is the capital of land {i}") for i in range(4)]
        found = await client.look_up(*asked)
        assert [names(one)[1] for one in found] == [
            "DEADLINE",
            "DEADLINE",
            "OVERLOADED",
            "OVERLOADED",
        ]
        embedder.release()


async def test_admin_invalidates_reports_and_counts(tmp_path: Path) -> None:
    options = config(tmp_path, embedder="none", data_dir=str(tmp_path / "data"))
    async with serving(options) as (_, client):
        await client.store(
            entry("a"), entry("b"), entry("a", domain="globex"), entry("c", model_id="big")
        )
        admin = client.admin

        async def invalidate(**fields: Any) -> int:
            response = await admin.Invalidate(admin_pb.InvalidateRequest(**fields))
            return int(response.num_entries)

        assert isinstance(
            await error_of(admin.Invalidate(admin_pb.InvalidateRequest())), InvalidRequest
        )
        assert await invalidate(tenant="acme", dry_run=True) == 3
        assert await invalidate(model_id="big") == 1
        assert await invalidate(sharing_domain="globex") == 1
        found = await client.look_up(query(1, "a"), query(2, "a", domain="globex"))
        assert [names(one)[0] for one in found] == ["HIT_EXACT", "MISS"]
        report = admin_pb.ReportBadHitRequest(entry_id=found[0].entry_id, sharing_domain="globex")
        assert isinstance(await error_of(admin.ReportBadHit(report)), NotFound)
        report.sharing_domain = "acme"
        assert (await admin.ReportBadHit(report)).newly_quarantined
        assert not (await admin.ReportBadHit(report)).newly_quarantined
        report.entry_id = "nonsense"
        assert isinstance(await error_of(admin.ReportBadHit(report)), NotFound)
        assert await client.store(entry("a")) == {"QUARANTINED": 1}
        assert await invalidate(entry_id="ans-0000000000000001") == 0
        assert await invalidate(all=True) == 1
        stats = await admin.GetStats(admin_pb.GetStatsRequest())
        assert (stats.num_entries, stats.num_quarantined, stats.epoch) == (0, 1, 1)
        assert stats.is_durable
        counted = {(one.outcome, one.reason): one.num_lookups for one in stats.lookups}
        assert counted == {
            (pb.LOOKUP_OUTCOME_HIT_EXACT, pb.LOOKUP_REASON_SAME_REQUEST): 1,
            (pb.LOOKUP_OUTCOME_MISS, pb.LOOKUP_REASON_NO_CANDIDATE): 1,
        }
    async with serving(options) as (_, client):
        stats = await client.admin.GetStats(admin_pb.GetStatsRequest())
        assert (stats.num_entries, stats.num_quarantined, stats.epoch) == (0, 1, 1)
        assert await client.store(entry("a")) == {"QUARANTINED": 1}


@pytest.mark.parametrize("scope", ["tenant", "model_id", "sharing_domain", "entry_id", "all"])
async def test_an_answer_that_began_before_an_invalidation_is_not_stored_after_it(
    tmp_path: Path, scope: str
) -> None:
    async with serving(config(tmp_path, embedder="none")) as (_, client):
        before = (await client.look_up(query(1, "a")))[0].mark
        await client.store(entry("a"), entry("b", domain="globex", model_id="big"))
        (hit,) = await client.look_up(query(1, "a"))
        values = {
            "tenant": "acme", "model_id": "demo", "sharing_domain": "acme",
            "entry_id": hit.entry_id, "all": True,
        }  # fmt: skip
        request = admin_pb.InvalidateRequest(**{scope: values[scope]})
        await client.admin.Invalidate(request)
        assert await client.store(entry("a", mark=before)) == {"OUTDATED": 1}
        other = entry("c", domain="globex", model_id="big", mark=before)
        assert await client.store(other) == {"OUTDATED" if scope == "all" else "STORED": 1}
        (missed,) = await client.look_up(query(1, "a"))
        assert names(missed)[0] == "MISS"
        assert await client.store(entry("a", mark=missed.mark)) == {"STORED": 1}


async def test_an_answer_that_began_in_another_life_of_the_cache_is_not_stored(
    tmp_path: Path,
) -> None:
    options = config(tmp_path, embedder="none", data_dir=str(tmp_path / "data"))
    async with serving(options) as (_, client):
        before = await client.mark()
        await client.admin.Invalidate(admin_pb.InvalidateRequest(tenant="acme"))
    async with serving(options) as (_, client):
        assert await client.store(entry("a", mark=before)) == {"OUTDATED": 1}
        assert await client.store(entry("a")) == {"STORED": 1}


async def test_an_answer_without_a_mark_is_not_stored(tmp_path: Path) -> None:
    async with serving(config(tmp_path, embedder="none")) as (_, client):
        response = await client.cache.Store(iter([pb.StoreRequest(entry=entry("a"))]))
        assert [one.outcome for one in response.counts] == [pb.STORE_OUTCOME_OUTDATED]


async def test_max_age_and_ttl_arrive(tmp_path: Path) -> None:
    now_s = [1000.0]
    options = config(tmp_path, embedder="none")
    async with serving(options, now_s=lambda: now_s[0]) as (_, client):
        await client.store(entry("a", ttl=Duration(seconds=30)))
        now_s[0] += 20.0
        found = await client.look_up(
            query(1, "a"),
            query(2, "a", max_age=Duration(seconds=10)),
            query(3, "a", traits=pb.RequestTraits(no_cache=True)),
        )
        assert [names(one) for one in found] == [
            ("HIT_EXACT", "SAME_REQUEST"),
            ("MISS", "TOO_OLD"),
            ("BYPASS", "NO_CACHE"),
        ]
        assert found[0].age.seconds == 20
        now_s[0] += 10.0
        assert names((await client.look_up(query(1, "a")))[0])[0] == "MISS"


async def test_drain_ends_streams_and_keeps_what_arrived(tmp_path: Path) -> None:
    options = config(tmp_path, embedder="none", data_dir=str(tmp_path / "data"))
    async with serving(options) as (service, client):
        async with rpc.channel(options.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
            assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
        lookups, stores = client.cache.Lookup(), client.cache.Store()
        await stores.write(pb.StoreRequest(entry=entry("a", mark=await client.mark())))
        found, lookup_id = "", 0
        while found != "HIT_EXACT":  # two calls: nothing orders one's messages before the other's
            lookup_id += 1
            await lookups.write(pb.LookupRequest(query=query(lookup_id, "a")))
            found, _ = names(await lookups.read())
        await service.drain(5.0)
        assert isinstance(await error_of(lookups.read()), Draining)
        assert isinstance(await error_of(stores), Draining)
    async with serving(options) as (_, client):
        assert names((await client.look_up(query(1, "a")))[0])[0] == "HIT_EXACT"
