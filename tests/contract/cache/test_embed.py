"""Embed of the real servicer: vectors for clients, behind lookups."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from infermesh.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelLoadFailed,
)
from infermesh.v1 import semantic_cache_service_pb2 as pb
from services.cache.batching import Lane
from services.cache.minilm import MiniLm
from tests.contract.cache.harness import (
    config,
    entry,
    error_of,
    names,
    query,
    serving,
)
from tests.unit.cache.embedders import WordEmbedder

FRANCE = "What is the capital of France?"


async def test_embed_gives_unit_vectors_in_order(tmp_path: Path, embedder: MiniLm) -> None:
    texts = [f"sentence {'very ' * (i % 5)}number {i}" for i in range(40)]
    async with serving(config(tmp_path), load_embedder=lambda: embedder) as (_, client):
        facts = await client.ready()
        assert (facts.dimensions, facts.max_tokens) == (384, 256)
        assert len(facts.model_fingerprint) == 64
        request = pb.SemanticCacheServiceEmbedRequest(texts=texts)
        response = await client.cache.Embed(request)
        assert (response.model_id, response.dimensions) == ("all-MiniLM-L6-v2", 384)
        alone = [embedder.encode(embedder.tokenize([text]))[0] for text in texts]
        for one, expected in zip(response.embeddings, alone, strict=True):
            assert len(one.values) == 384
            # Padding to the longest of a batch changes sums in the last bits of float32.
            assert max(abs(a - b) for a, b in zip(one.values, expected, strict=True)) < 1e-5
        tokens = [len(ids) for ids in embedder.tokenize(texts)]
        assert [one.num_tokens for one in response.embeddings] == tokens


async def test_embed_refuses_by_index_what_it_can_not_embed(
    tmp_path: Path, embedder: MiniLm
) -> None:
    long = "word " * 300
    options = config(tmp_path, embed_max_texts=3)
    async with serving(options, load_embedder=lambda: embedder) as (_, client):
        await client.ready()

        def embed(*texts: str, **fields: Any) -> Any:
            request = pb.SemanticCacheServiceEmbedRequest(texts=texts, **fields)
            return client.cache.Embed(request)

        too_long = await error_of(embed("short", long))
        assert isinstance(too_long, ContextLengthExceeded)
        assert too_long.param == "texts[1]"
        assert isinstance(await error_of(embed("a", "")), InvalidRequest)
        assert isinstance(await error_of(embed()), InvalidRequest)
        assert isinstance(await error_of(embed(*"abcd")), InvalidRequest)
        cut = await embed("short", long, allow_truncation=True)
        assert [one.truncated for one in cut.embeddings] == [False, True]
        assert cut.embeddings[1].num_tokens == 256


async def test_embed_is_refused_by_name_when_there_is_no_embedder(tmp_path: Path) -> None:
    async with serving(config(tmp_path, embedder="none")) as (_, client):
        request = pb.SemanticCacheServiceEmbedRequest(texts=["a"])
        assert isinstance(await error_of(client.cache.Embed(request)), ModelLoadFailed)
        assert (await client.ready()).state == pb.EMBEDDER_STATE_DISABLED
    missing = config(tmp_path, embedder=str(tmp_path / "absent"))
    async with serving(missing) as (_, client):
        assert (await client.ready()).state == pb.EMBEDDER_STATE_FAILED
        error = await error_of(client.cache.Embed(request))
        assert isinstance(error, ModelLoadFailed)
        await client.store(entry(FRANCE))
        found = await client.look_up(query(1, FRANCE), query(2, "capital of france"))
        assert [names(one)[1] for one in found] == ["SAME_REQUEST", "EMBEDDER_FAILED"]


async def test_lookups_overtake_bulk_embedding(tmp_path: Path) -> None:
    embedder = WordEmbedder()
    options = config(tmp_path, embed_slice_tokens=8)
    async with serving(options, load_embedder=lambda: embedder) as (service, client):
        await client.ready()
        await client.store(entry(FRANCE))
        await client.indexed(1)
        embedder.hold()
        texts = [f"bulk text number {i} of many words here" for i in range(30)]
        bulk = client.cache.Embed(pb.SemanticCacheServiceEmbedRequest(texts=texts))
        assert await asyncio.to_thread(embedder.has_begun.wait, 10)
        num_passes = len(embedder.passes)
        lookup = asyncio.ensure_future(client.look_up(query(1, "what is france like")))
        await lookup_is_queued(service)
        embedder.release()
        assert names((await lookup)[0])[0] == "MISS"
        assert len((await bulk).embeddings) == 30
        assert embedder.passes[num_passes] == [4], "a bulk pass went first"


async def lookup_is_queued(service: Any) -> None:
    queue = service._thread._queue
    room = queue.room(Lane.LOOKUP)
    while True:
        if queue.room(Lane.LOOKUP) < room:
            return
        await asyncio.sleep(0)
