"""Lookups and stores together, without a wire: scopes, lives, quarantine, deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from infermesh.config import CacheConfig
from infermesh.errors import NotFound
from services.cache.batching import Lane, LaneLimits
from services.cache.domain import Found, Keys, Outcome, Query, Reason, StoreOutcome
from services.cache.embedding_thread import EmbeddingThread
from services.cache.holdings import Holdings
from services.cache.invalidations import Invalidations
from services.cache.keeper import Keeper
from services.cache.lookups import Lookups
from services.cache.store import Store
from tests.unit.cache.embedders import WordEmbedder
from tests.unit.cache.entries import INSTANCE, OPEN, draft, keys, query

LIMITS = {lane: LaneLimits(max_batch=8, max_wait_s=0.0, max_queued=16) for lane in Lane}
QUESTION = "What is the capital of France?"
REWORDED = "what is the capital of france"


class Cache:
    """The parts of a cache in memory, on a clock of the test's."""

    def __init__(self, thread: EmbeddingThread | None, **options: Any) -> None:
        self.now_s = 1000.0
        defaults = {"lookup_deadline_ms": 20_000.0, "threshold": 0.8, "words_first": False}
        config = CacheConfig(**{**defaults, **options})
        self.holdings = Holdings(Store(config.max_bytes), None, thread, self.clock)
        self.holdings.invalidations = Invalidations(INSTANCE)
        self.lookups = Lookups(config, self.holdings, thread, self.clock)
        self.keeper = Keeper(config, self.holdings, thread, self.clock)

    def clock(self) -> float:
        return self.now_s

    async def find(self, asked: Query) -> Found:
        return self.lookups.at_once(asked) or await self.lookups.by_meaning(asked)

    async def reason(self, asked: Query) -> Reason:
        return (await self.find(asked)).decision.reason

    async def indexed(self, count: int) -> None:
        async with asyncio.timeout(10):
            while True:
                if self.holdings.store.num_indexed >= count:
                    return
                await asyncio.sleep(0)


@asynccontextmanager
async def running(embedder: WordEmbedder, **options: Any) -> AsyncIterator[Cache]:
    thread = EmbeddingThread(lambda: embedder, LIMITS, 1000, options.get("top_k", 5))
    cache = Cache(thread, **options)
    ready = asyncio.Event()

    def on_ready() -> None:
        cache.keeper.embedder_is_ready()
        ready.set()

    thread.start(on_ready)
    await ready.wait()
    indexer = asyncio.ensure_future(cache.keeper.index_entries())
    try:
        yield cache
    finally:
        indexer.cancel()
        embedder.release()
        assert thread.stop(10.0)


def of_question(asked: Keys) -> bool:
    """An invalidation of QUESTION alone."""
    return asked.exact == keys(QUESTION).exact


async def test_lookup_climbs_from_exact_to_meaning() -> None:
    async with running(WordEmbedder()) as cache:
        assert await cache.reason(query(QUESTION)) is Reason.NO_CANDIDATE
        assert cache.keeper.keep(draft(QUESTION)) is StoreOutcome.STORED
        exact = await cache.find(query(QUESTION))
        assert exact.decision.outcome is Outcome.HIT_EXACT
        await cache.indexed(1)
        near = await cache.find(query(REWORDED))
        assert near.decision.outcome is Outcome.HIT_SEMANTIC
        assert near.entry == exact.entry
        assert await cache.reason(query("What is the capital of Spain?")) is Reason.NAMES_DIFFER


@pytest.mark.parametrize(
    "other",
    [
        {"sharing_domain": "other"},
        {"model_fingerprint": "other"},
        {"compatibility_fingerprint": b"o" * 32},
    ],
)
async def test_lookup_misses_by_meaning_when_the_scope_differs(other: dict[str, Any]) -> None:
    async with running(WordEmbedder()) as cache:
        cache.keeper.keep(draft(QUESTION))
        await cache.indexed(1)
        assert await cache.reason(query(REWORDED)) is Reason.SAME_MEANING
        scoped: Keys = replace(keys(REWORDED), **other)
        assert await cache.reason(query(REWORDED, keys=scoped)) is Reason.NO_CANDIDATE


@pytest.mark.parametrize(
    "other",
    [
        {"sharing_domain": "other"},
        {"model_fingerprint": "other"},
        {"exact_fingerprint": b"o" * 32, "compatibility_fingerprint": b"o" * 32},
    ],
)
async def test_lookup_misses_exactly_when_the_scope_differs(other: dict[str, Any]) -> None:
    cache = Cache(None)
    cache.keeper.keep(draft(QUESTION))
    assert await cache.reason(query(QUESTION)) is Reason.SAME_REQUEST
    scoped: Keys = replace(keys(QUESTION), **other)
    assert (await cache.find(query(QUESTION, keys=scoped))).decision.outcome is Outcome.MISS


async def test_the_gates_close_the_semantic_tier_alone() -> None:
    async with running(WordEmbedder()) as cache:
        tools = replace(OPEN, has_tools=True)
        cache.keeper.keep(draft(QUESTION, traits=tools))
        assert await cache.reason(query(QUESTION, traits=tools)) is Reason.SAME_REQUEST
        assert await cache.reason(query(REWORDED, traits=tools)) is Reason.TOOLS
        assert not cache.holdings.store.has_partition(keys().partition)


async def test_a_personal_question_is_kept_out_of_the_semantic_tier() -> None:
    cache = Cache(None)
    cache.keeper.keep(draft("What is my balance?"))
    assert not cache.holdings.store.has_partition(keys().partition)
    assert await cache.reason(query("What is my balance?")) is Reason.SAME_REQUEST


async def test_no_cache_is_a_bypass_and_its_answer_takes_the_place() -> None:
    cache = Cache(None)
    cache.keeper.keep(draft(QUESTION))
    fresh = replace(OPEN, no_cache=True)
    found = await cache.find(query(QUESTION, traits=fresh))
    assert found.decision.outcome is Outcome.BYPASS
    cache.now_s += 10.0
    assert cache.keeper.keep(draft(QUESTION)) is StoreOutcome.DUPLICATE
    assert (await cache.find(query(QUESTION))).age_s == 10.0
    assert cache.keeper.keep(draft(QUESTION, replace=True)) is StoreOutcome.STORED
    assert (await cache.find(query(QUESTION))).age_s == 0.0
    assert len(cache.holdings.store) == 1


async def test_an_answer_ends_at_its_absolute_time() -> None:
    cache = Cache(None, ttl_s=100.0, volatile_ttl_s=60.0)
    cache.keeper.keep(draft(QUESTION))
    cache.keeper.keep(draft("What is the weather in Paris?"))
    cache.keeper.keep(draft("short", ttl_s=5.0))
    cache.keeper.keep(draft("long", ttl_s=500.0))
    lives = {one.entry.text: one.entry.expires_s - 1000.0 for one in cache.holdings.store}
    assert lives == {
        QUESTION: 100.0,
        "What is the weather in Paris?": 60.0,
        "short": 5.0,
        "long": 100.0,
    }
    cache.now_s += 100.0
    assert (await cache.find(query(QUESTION))).decision.outcome is Outcome.MISS
    cache.holdings.expire()
    assert len(cache.holdings.store) == 0


async def test_max_age_refuses_an_older_answer() -> None:
    cache = Cache(None)
    cache.keeper.keep(draft(QUESTION))
    cache.now_s += 10.0
    assert await cache.reason(query(QUESTION, max_age_s=9.0)) is Reason.TOO_OLD
    assert await cache.reason(query(QUESTION, max_age_s=10.0)) is Reason.SAME_REQUEST


async def test_words_refuse_before_anything_is_embedded_when_they_come_first() -> None:
    embedder = WordEmbedder()
    async with running(embedder, words_first=True) as cache:
        cache.keeper.keep(draft(QUESTION))
        await cache.indexed(1)
        embedder.hold()
        refused = await cache.find(query("what is the capital of italy"))
        assert refused.decision.reason is Reason.NAMES_DIFFER
        assert refused.decision.similarity is None  # nothing was compared
        embedder.release()
        assert await cache.reason(query(REWORDED)) is Reason.SAME_MEANING


async def test_a_lookup_is_a_miss_when_the_embedder_hangs() -> None:
    embedder = WordEmbedder()
    async with running(embedder, lookup_deadline_ms=20.0) as cache:
        cache.keeper.keep(draft(QUESTION))
        await cache.indexed(1)
        embedder.hold()
        assert await cache.reason(query("what is the capital of italy")) is Reason.DEADLINE
        assert await cache.reason(query(QUESTION)) is Reason.SAME_REQUEST
        cache.lookups._deadline_s = 0.0  # now the pass under way has lasted too long
        assert await cache.reason(query("what is the capital of peru")) is Reason.EMBEDDER_FAILED


async def test_the_callers_deadline_counts_when_it_is_earlier() -> None:
    embedder = WordEmbedder()
    async with running(embedder) as cache:
        cache.keeper.keep(draft(QUESTION))
        await cache.indexed(1)
        embedder.hold()
        asked = query("what is the capital of italy", deadline_s=0.01)
        assert await cache.reason(asked) is Reason.DEADLINE


async def test_a_long_text_has_no_semantic_tier() -> None:
    async with running(WordEmbedder()) as cache:
        cache.keeper.keep(draft(QUESTION))
        await cache.indexed(1)
        assert await cache.reason(query("word " * 40)) is Reason.TEXT_TOO_LONG


async def test_a_removed_entry_is_found_no_more_by_meaning() -> None:
    async with running(WordEmbedder()) as cache:
        cache.keeper.keep(draft(QUESTION))
        cache.keeper.keep(draft("What is the capital of Spain?"))
        await cache.indexed(2)
        wanted = await cache.keeper.invalidate(of_question, dry_run=True)
        assert wanted == 1
        assert await cache.reason(query(REWORDED)) is Reason.SAME_MEANING
        await cache.keeper.invalidate(of_question, dry_run=False)
        assert await cache.reason(query(REWORDED)) is Reason.NAMES_DIFFER
        await cache.keeper.invalidate(None, dry_run=False)
        assert await cache.reason(query(REWORDED)) is Reason.NO_CANDIDATE
        assert cache.holdings.epoch == 1


async def test_a_removed_entry_stands_in_no_others_way() -> None:
    async with running(WordEmbedder(), top_k=1) as cache:
        cache.keeper.keep(draft(QUESTION))
        cache.keeper.keep(draft("Tell me the capital of France"))
        await cache.indexed(2)
        await cache.keeper.invalidate(of_question, dry_run=False)
        assert await cache.reason(query(REWORDED)) is Reason.SAME_MEANING


async def test_a_bad_hit_is_kept_out_until_the_quarantine_ends() -> None:
    cache = Cache(None, quarantine_s=100.0, ttl_s=1000.0)
    cache.keeper.keep(draft(QUESTION))
    hit = await cache.find(query(QUESTION))
    assert hit.entry is not None
    with pytest.raises(NotFound):
        await cache.keeper.report_bad_hit(hit.entry.id, "other")
    assert await cache.keeper.report_bad_hit(hit.entry.id, "acme") is True
    assert await cache.keeper.report_bad_hit(hit.entry.id, "acme") is False
    with pytest.raises(NotFound):
        await cache.keeper.report_bad_hit(hit.entry.id, "other")
    assert await cache.reason(query(QUESTION)) is Reason.NO_CANDIDATE
    assert cache.keeper.keep(draft(QUESTION)) is StoreOutcome.QUARANTINED
    cache.now_s += 100.0
    assert cache.keeper.keep(draft(QUESTION)) is StoreOutcome.STORED


async def test_an_answer_that_began_before_an_invalidation_is_not_kept_after_it() -> None:
    cache = Cache(None)
    invalidations = cache.holdings.invalidations
    began = invalidations.mark
    assert cache.keeper.keep(draft(QUESTION, mark=began)) is StoreOutcome.STORED
    await cache.keeper.invalidate(lambda asked: asked.tenant == "acme", dry_run=True)
    assert cache.keeper.keep(draft(QUESTION, mark=began)) is StoreOutcome.DUPLICATE
    await cache.keeper.invalidate(lambda asked: asked.tenant == "acme", dry_run=False)
    assert cache.keeper.keep(draft(QUESTION, mark=began)) is StoreOutcome.OUTDATED
    assert cache.keeper.keep(draft(QUESTION, mark=began, replace=True)) is StoreOutcome.OUTDATED
    other = draft(QUESTION, mark=began, domain="globex")
    assert cache.keeper.keep(other) is StoreOutcome.STORED
    assert cache.keeper.keep(draft(QUESTION, mark=invalidations.mark)) is StoreOutcome.STORED


async def test_an_invalidated_entry_is_not_kept_again_by_an_answer_that_was_under_way() -> None:
    cache = Cache(None)
    began = cache.holdings.invalidations.mark
    cache.keeper.keep(draft(QUESTION, mark=began))
    hit = await cache.find(query(QUESTION))
    assert hit.entry is not None
    assert await cache.keeper.invalidate_entry(hit.entry.id, dry_run=True) == 1
    assert await cache.keeper.invalidate_entry(hit.entry.id, dry_run=False) == 1
    assert await cache.keeper.invalidate_entry(hit.entry.id, dry_run=False) == 0
    assert cache.keeper.keep(draft(QUESTION, mark=began)) is StoreOutcome.OUTDATED
    assert cache.keeper.keep(draft(REWORDED, mark=began)) is StoreOutcome.STORED


async def test_an_answer_that_began_before_the_epoch_is_not_kept_after_it() -> None:
    cache = Cache(None)
    began = cache.holdings.invalidations.mark
    await cache.keeper.invalidate(None, dry_run=False)
    assert cache.keeper.keep(draft(QUESTION, mark=began)) is StoreOutcome.OUTDATED
    now = cache.holdings.invalidations.mark
    assert cache.keeper.keep(draft(QUESTION, mark=now)) is StoreOutcome.STORED


async def test_an_answer_larger_than_allowed_is_not_kept() -> None:
    cache = Cache(None, max_entry_bytes=1024)
    assert cache.keeper.keep(draft("q" * 2000)) is StoreOutcome.TOO_LARGE
    assert len(cache.holdings.store) == 0


async def test_the_budget_holds_whatever_is_stored() -> None:
    cache = Cache(None, max_bytes=1 << 20)
    for number in range(600):
        cache.keeper.keep(draft(f"question {number}"))
    assert cache.holdings.store.num_bytes <= 1 << 20
    assert cache.holdings.removed["evicted"] == 600 - len(cache.holdings.store)


async def test_an_entry_is_indexed_once_when_it_was_kept_before_the_embedder_was_ready() -> None:
    embedder = WordEmbedder()
    thread = EmbeddingThread(lambda: embedder, LIMITS, 1000, top_k=5)
    cache = Cache(thread)
    cache.keeper.keep(draft(QUESTION))
    ready = asyncio.Event()
    thread.start(ready.set)
    await ready.wait()
    cache.keeper.embedder_is_ready()
    assert list(cache.holdings.to_embed) == [held.entry.id for held in cache.holdings.store]
    assert await asyncio.to_thread(thread.stop, 10.0)
