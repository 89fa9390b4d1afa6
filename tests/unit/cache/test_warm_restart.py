"""What comes back with the files: entries at once, vectors if this very model made them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.cache import records
from services.cache.domain import Entry, Reason
from services.cache.recovery import Recovered
from tests.unit.cache.embedders import WordEmbedder
from tests.unit.cache.entries import entry, query
from tests.unit.cache.test_lookups import QUESTION, REWORDED, Cache, running


def recovered(*entries: Entry, embedder: str, num_values: int = 64) -> Recovered:
    model = WordEmbedder()
    found = Recovered(epoch=3, generation=1)
    for one in entries:
        vector = model.encode(model.tokenize([one.text]))[0][:num_values]
        found.apply(records.of_entry(one, num_hits=4))
        found.apply(records.Embedded(one.id, embedder, vector.astype("<f4").tobytes()))
    return found


async def restarted(cache: Cache, found: Recovered) -> None:
    """As `CacheService` does it, though the embedder is ready already."""
    cache.holdings.restore(found)
    cache.keeper.embedder_is_ready()
    await cache.indexed(1)


async def test_a_warm_restart_embeds_nothing_when_the_model_is_the_same() -> None:
    embedder = WordEmbedder()
    async with running(embedder) as cache:
        one = entry(1, text=QUESTION, created_s=900.0)
        await restarted(cache, recovered(one, embedder="print-of-words"))
        assert embedder.passes == []
        assert await cache.reason(query(REWORDED)) is Reason.SAME_MEANING
        assert cache.holdings.epoch == 3
        assert next(iter(cache.holdings.store)).num_hits == 5


@pytest.mark.parametrize(("embedder", "num_values"), [("another", 64), ("print-of-words", 63)])
async def test_a_warm_restart_embeds_anew_when_the_vector_is_another_models(
    embedder: str, num_values: int
) -> None:
    model = WordEmbedder()
    async with running(model) as cache:
        one = entry(1, text=QUESTION, created_s=900.0)
        await restarted(cache, recovered(one, embedder=embedder, num_values=num_values))
        assert len(model.passes) == 1
        assert await cache.reason(query(REWORDED)) is Reason.SAME_MEANING


async def test_a_warm_restart_leaves_out_what_is_over_or_kept_out() -> None:
    cache = Cache(None)
    lives, over, bad = (
        entry(1, text="lives", created_s=900.0),
        replace(entry(2, text="over", created_s=0.0), expires_s=999.0),
        entry(3, text="bad", created_s=900.0),
    )
    found = recovered(lives, over, bad, embedder="print-of-words")
    domain, fingerprint, exact = bad.keys.exact
    found.apply(records.Quarantined(3, exact, domain, fingerprint, 2000.0))
    cache.holdings.restore(found)
    assert [held.entry.id for held in cache.holdings.store] == [1]
