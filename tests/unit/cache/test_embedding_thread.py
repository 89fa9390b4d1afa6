"""The embedding thread: lookups first, one pass per batch, nothing lost when it fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from infermesh.errors import Internal, MeshError, ModelLoadFailed
from services.cache.batching import Lane, LaneLimits
from services.cache.domain import EntryId
from services.cache.embedding import Embedder, Job, State
from services.cache.embedding_thread import EmbeddingThread
from tests.unit.cache.embedders import MAX_TOKENS, WordEmbedder
from tests.unit.cache.entries import keys

LIMITS = {lane: LaneLimits(max_batch=8, max_wait_s=0.0, max_queued=16) for lane in Lane}
PARTITION = keys().partition


@asynccontextmanager
async def running(
    embedder: WordEmbedder, slice_tokens: int = 100
) -> AsyncIterator[EmbeddingThread]:
    ready = asyncio.Event()
    thread = EmbeddingThread(lambda: embedder, LIMITS, slice_tokens, top_k=5)
    thread.start(ready.set)
    await ready.wait()
    try:
        yield thread
    finally:
        embedder.release()
        assert thread.stop(10.0)


def job(text: str, **fields: object) -> Job:
    return Job(text, asyncio.get_running_loop().create_future(), **fields)  # type: ignore[arg-type]


async def begun(embedder: WordEmbedder) -> None:
    assert await asyncio.to_thread(embedder.has_begun.wait, 10)


async def test_lookup_finds_an_entry_when_it_was_indexed_before() -> None:
    async with running(WordEmbedder()) as thread:
        stored = job("capital of France", partition=PARTITION, entry_id=EntryId(7))
        asked = job("capital of France please", partition=PARTITION)
        elsewhere = job("capital of France", partition=keys(domain="other").partition)
        assert thread.submit(Lane.INDEX, stored)
        await stored.future
        assert thread.submit(Lane.LOOKUP, asked, elsewhere)
        near = (await asked.future).neighbours
        assert [one.entry_id for one in near] == [7]
        assert near[0].similarity == pytest.approx((3 / 4) ** 0.5, abs=1e-6)
        assert (await elsewhere.future).neighbours == ()


async def test_lookups_go_between_two_slices_of_bulk_work() -> None:
    embedder = WordEmbedder()
    async with running(embedder, slice_tokens=4) as thread:
        embedder.hold()
        bulk = [job(f"bulk text number {i}") for i in range(4)]
        assert thread.submit(Lane.EMBED, *bulk)
        await begun(embedder)
        asked = job("a lookup", partition=PARTITION)
        assert thread.submit(Lane.LOOKUP, asked)
        embedder.release()
        await asyncio.gather(*(one.future for one in bulk), asked.future)
        assert embedder.passes == [[4], [2], [4], [4], [4]]


async def test_texts_are_embedded_together_when_they_came_together() -> None:
    embedder = WordEmbedder()
    async with running(embedder) as thread:
        jobs = [job(f"text {i}") for i in range(8)]
        assert thread.submit(Lane.EMBED, *jobs)
        await asyncio.gather(*(one.future for one in jobs))
        assert embedder.passes == [[2] * 8]


async def test_a_text_is_embedded_once_when_it_comes_again() -> None:
    embedder = WordEmbedder()
    async with running(embedder) as thread:
        for lane in (Lane.LOOKUP, Lane.INDEX, Lane.EMBED):
            again = job("the same text", partition=PARTITION)
            assert thread.submit(lane, again)
            await again.future
        assert len(embedder.passes) == 1


async def test_a_long_text_is_not_embedded_unless_it_may_be_cut() -> None:
    text = " ".join(f"w{i}" for i in range(MAX_TOKENS + 3))
    async with running(WordEmbedder()) as thread:
        whole, cut = job(text), job(text, allow_truncation=True)
        assert thread.submit(Lane.EMBED, whole)
        assert (await whole.future).vector is None
        assert (await whole.future).num_tokens == MAX_TOKENS + 3
        assert thread.submit(Lane.EMBED, cut)
        result = await cut.future
        assert result.is_truncated
        assert result.num_tokens == MAX_TOKENS
        again = job(text)
        assert thread.submit(Lane.EMBED, again)
        assert (await again.future).vector is None, "a cut text was remembered as a whole one"


async def test_submit_refuses_when_the_lane_is_full() -> None:
    embedder = WordEmbedder()
    async with running(embedder) as thread:
        embedder.hold()
        assert thread.submit(Lane.LOOKUP, job("first"))
        await begun(embedder)
        waiting = [job(f"w {i}") for i in range(16)]
        assert thread.submit(Lane.LOOKUP, *waiting)
        assert not thread.submit(Lane.LOOKUP, job("too many"))


async def test_a_job_is_dropped_when_its_caller_is_gone() -> None:
    embedder = WordEmbedder()
    async with running(embedder) as thread:
        embedder.hold()
        first, gone, last = job("first"), job("gone"), job("last one")
        assert thread.submit(Lane.LOOKUP, first)
        await begun(embedder)
        assert thread.submit(Lane.LOOKUP, gone)
        assert thread.submit(Lane.LOOKUP, last)
        gone.future.cancel()
        embedder.release()
        await last.future
        assert embedder.passes == [[1], [2]]


async def test_the_thread_goes_on_when_a_pass_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = WordEmbedder()
    async with running(embedder) as thread:

        def fail(_: object) -> None:
            raise RuntimeError("out of memory on a secret text")

        monkeypatch.setattr(embedder, "encode", fail)
        broken = job("text")
        assert thread.submit(Lane.EMBED, broken)
        with pytest.raises(Internal) as caught:
            await broken.future
        assert "secret" not in caught.value.message
        monkeypatch.undo()
        after = job("text")
        assert thread.submit(Lane.EMBED, after)
        assert (await after.future).vector is not None


async def test_the_state_is_failed_when_the_model_can_not_be_loaded() -> None:
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def load() -> Embedder:
        loop.call_soon_threadsafe(done.set)
        raise ModelLoadFailed("no such model")

    thread = EmbeddingThread(load, LIMITS, 100, top_k=5)
    thread.start(lambda: None)
    await done.wait()
    assert thread.stop(10.0)
    assert thread.state is State.FAILED
    assert isinstance(thread.error, MeshError)
