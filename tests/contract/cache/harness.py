"""A real CacheService on a unix socket, and a client that speaks its streams."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from infermesh import rpc
from infermesh.config import CacheConfig
from infermesh.errors import MeshError, from_rpc_error
from infermesh.v1 import sampling_pb2
from infermesh.v1 import semantic_cache_admin_service_pb2 as admin_pb
from infermesh.v1 import semantic_cache_admin_service_pb2_grpc as admin_grpc
from infermesh.v1 import semantic_cache_service_pb2 as pb
from infermesh.v1 import semantic_cache_service_pb2_grpc as pb_grpc
from services.cache.service import CacheService

DEADLINE_S = 60.0


class Client:
    """Stubs on a channel of its own."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.cache: Any = pb_grpc.SemanticCacheServiceStub(channel)
        self.admin: Any = admin_grpc.SemanticCacheAdminServiceStub(channel)

    async def store(self, *entries: pb.Entry) -> dict[str, int]:
        """Outcomes by name; entries without a mark get the cache's of now."""
        mark = await self.mark()
        requests = [pb.StoreRequest(entry=marked(entry, mark)) for entry in entries]
        response = await self.cache.Store(iter(requests), timeout=DEADLINE_S)
        prefix = "STORE_OUTCOME_"
        return {
            pb.StoreOutcome.Name(one.outcome).removeprefix(prefix): one.num_entries
            for one in response.counts
        }

    async def mark(self) -> bytes:
        """Of what begins now."""
        response = await self.cache.GetEmbedder(pb.GetEmbedderRequest(), timeout=DEADLINE_S)
        return bytes(response.mark)

    async def look_up(self, *queries: pb.Query) -> list[pb.LookupResponse]:
        """Answers in the order of the queries, over one call."""
        requests = [pb.LookupRequest(query=query) for query in queries]
        call = self.cache.Lookup(iter(requests), timeout=DEADLINE_S)
        answers = {answer.lookup_id: answer async for answer in call}
        return [answers[query.lookup_id] for query in queries]

    async def ready(self) -> pb.GetEmbedderResponse:
        """Waits for the embedder."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                response = await self.cache.GetEmbedder(pb.GetEmbedderRequest(), timeout=5)
                if response.state != pb.EMBEDDER_STATE_LOADING:
                    return response
                await asyncio.sleep(0.02)  # a poll of another thread's progress

    async def indexed(self, count: int) -> None:
        """Waits until so many entries can be found by meaning."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                stats = await self.admin.GetStats(admin_pb.GetStatsRequest(), timeout=5)
                if stats.num_semantic_entries >= count:
                    return
                await asyncio.sleep(0.02)  # a poll of another thread's progress


@asynccontextmanager
async def serving(
    config: CacheConfig, **options: Any
) -> AsyncIterator[tuple[CacheService, Client]]:
    """A started service and a client; stopped at the end."""
    service = CacheService(config, **options)
    try:
        async with asyncio.TaskGroup() as tasks:
            background = tasks.create_task(_run(service))
            async with rpc.channel(config.address) as channel:
                client = Client(channel)
                await client.cache.GetEmbedder(
                    pb.GetEmbedderRequest(), wait_for_ready=True, timeout=DEADLINE_S
                )
                try:
                    yield service, client
                finally:
                    background.cancel()
    finally:
        await service.stop()


async def _run(service: CacheService) -> None:
    async with asyncio.TaskGroup() as tasks:
        await service.start(tasks)


def config(tmp_path: Path, **fields: Any) -> CacheConfig:
    """Settings for one test; lookups go all the way, unless it asks for words first."""
    defaults = {
        "address": f"unix:{tmp_path}/cache.sock",
        "lookup_deadline_ms": 20_000,
        "words_first": False,
    }
    return CacheConfig(**{**defaults, **fields})


def digest(*parts: str) -> bytes:
    """A fingerprint as the gateway makes it: 32 bytes."""
    return hashlib.sha256("\0".join(parts).encode()).digest()


def keys(text: str, *, domain: str = "acme", context: str = "") -> dict[str, Any]:
    """What a query and an entry have in common; `context` stands for the rest of the request."""
    return {
        "exact_fingerprint": digest(context, text),
        "compatibility_fingerprint": digest(context),
        "tenant": domain,
        "sharing_domain": domain,
        "model_id": "demo",
        "model_fingerprint": "f" * 8,
        "text": text,
        "traits": pb.RequestTraits(semantic_enabled=True, n=1),
    }


def query(lookup_id: int, text: str, **fields: Any) -> pb.Query:
    """A lookup."""
    own = {name: fields.pop(name) for name in ("domain", "context") if name in fields}
    return pb.Query(lookup_id=lookup_id, **{**keys(text, **own), **fields})


def answer(token_ids: Iterable[int] = (1, 2, 3), **fields: Any) -> pb.Answer:
    """A finished answer."""
    choice = pb.AnswerChoice(token_ids=token_ids, finish_reason=sampling_pb2.FINISH_REASON_STOP)
    return pb.Answer(choices=[choice], **{"prompt_tokens": 5, "compute_seconds": 0.5, **fields})


def entry(text: str, **fields: Any) -> pb.Entry:
    """An offer."""
    own = {name: fields.pop(name) for name in ("domain", "context") if name in fields}
    return pb.Entry(**{**keys(text, **own), "answer": answer(), **fields})


def marked(offered: pb.Entry, mark: bytes) -> pb.Entry:
    """The offer with a mark, if it has none."""
    copy = pb.Entry(mark=mark)
    copy.MergeFrom(offered)
    return copy


def names(response: pb.LookupResponse) -> tuple[str, str]:
    """Outcome and reason without their prefixes."""
    return (
        pb.LookupOutcome.Name(response.outcome).removeprefix("LOOKUP_OUTCOME_"),
        pb.LookupReason.Name(response.reason).removeprefix("LOOKUP_REASON_"),
    )


async def error_of(call: Any) -> MeshError:
    """What a call failed with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)
