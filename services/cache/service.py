"""The cache as a service: its parts put together, started, drained and stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from infermesh import rpc
from infermesh.config import CacheConfig
from infermesh.errors import ModelLoadFailed
from infermesh.security.posture import LOCAL, Security
from infermesh.v1 import semantic_cache_admin_service_pb2_grpc as admin_grpc
from infermesh.v1 import semantic_cache_service_pb2_grpc as pb_grpc
from services.cache import admin, recovery, server
from services.cache.admin import CacheAdminServicer
from services.cache.batching import Lane, LaneLimits
from services.cache.embedding import Embedder
from services.cache.embedding_thread import EmbeddingThread
from services.cache.embeddings import Embeddings
from services.cache.holdings import Holdings
from services.cache.journal import Journal
from services.cache.keeper import INDEX_BATCH, Keeper
from services.cache.lookups import Lookups
from services.cache.server import CacheServicer
from services.cache.store import Store

_STOP_S = 2.0
_MAX_QUEUED_LOOKUPS = 1024
NO_EMBEDDER = "none"


class CacheService:
    """Implements infermesh.lifecycle.Service."""

    name = "cache"

    def __init__(
        self,
        config: CacheConfig,
        security: Security = LOCAL,
        *,
        load_embedder: Callable[[], Embedder] | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        security.check_service("cache.address", config.address)
        self._config = config
        self._security = security
        self._now_s = now_s
        self._thread: EmbeddingThread | None = None
        if config.embedder != NO_EMBEDDER:
            self._thread = _embedding_thread(config, load_embedder or self._load_embedder)
        self._journal: Journal | None = None
        self._server = rpc.create_server(guarded=security.certificates is not None)
        self._servicer: CacheServicer | None = None
        self._health: rpc.HealthHandle | None = None
        self.address = config.address

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Reads what the data folder holds, then serves; the embedder is loaded meanwhile."""
        config = self._config
        holdings = await self._warm_holdings()
        lookups = Lookups(config, holdings, self._thread, self._now_s)
        keeper = Keeper(config, holdings, self._thread, self._now_s)
        embeddings = Embeddings(config, self._thread)
        if self._thread is not None:
            self._thread.start(keeper.embedder_is_ready)
        self._servicer = CacheServicer(lookups, keeper, embeddings, holdings, config, tasks)
        pb_grpc.add_SemanticCacheServiceServicer_to_server(self._servicer, self._server)
        admin_grpc.add_SemanticCacheAdminServiceServicer_to_server(
            CacheAdminServicer(lookups, keeper, embeddings, holdings, config.max_bytes),
            self._server,
        )
        names = (server.SERVICE_NAME, admin.SERVICE_NAME)
        self._health = rpc.add_standard_services(self._server, names)
        self.address = rpc.bind(self._server, config.address, self._security.certificates)
        await self._server.start()
        tasks.create_task(keeper.index_entries())
        tasks.create_task(keeper.take_entries_apart())
        tasks.create_task(keeper.keep_house())
        await self._health.set_serving(True)
        self._security.report({"cache.address": self.address})

    async def drain(self, grace_s: float) -> None:
        """Ends the streams: a gateway takes an unanswered lookup for a miss."""
        if self._health is not None:
            await self._health.set_serving(False)
        if self._servicer is not None:
            self._servicer.drain()
        await self._server.stop(grace_s)

    async def stop(self) -> None:
        """Closes the socket, then the log, then the embedder."""
        await self._server.stop(grace=_STOP_S)
        if self._journal is not None:
            await asyncio.to_thread(self._journal.stop, _STOP_S)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.stop, _STOP_S)

    def announce(self) -> dict[str, str]:
        """The bound address."""
        return {"address": self.address}

    async def _warm_holdings(self) -> Holdings:
        config = self._config
        store = Store(config.max_bytes)
        if not config.data_dir:
            return Holdings(store, None, self._thread, self._now_s)
        folder = Path(config.data_dir)
        self._journal = journal = Journal(folder, config.fsync_interval_s)
        recovered = await asyncio.to_thread(recovery.recover, folder)
        journal.start(recovered.generation)
        holdings = Holdings(store, journal, self._thread, self._now_s)
        holdings.restore(recovered)
        if recovered.num_bytes > config.snapshot_log_bytes or recovered.num_corrupt:
            holdings.snapshot()
        return holdings

    def _load_embedder(self) -> Embedder:
        # torch comes with it: imported in its thread, after the server answers.
        try:
            from services.cache import minilm
        except ImportError as error:
            raise ModelLoadFailed(f"the embedder needs a package: {error}") from error
        config = self._config
        return minilm.load(config.embedder, config.embedder_device, config.embedder_threads)


def _embedding_thread(config: CacheConfig, load: Callable[[], Embedder]) -> EmbeddingThread:
    limits = {
        Lane.LOOKUP: LaneLimits(
            config.lookup_max_batch, config.lookup_wait_ms / 1e3, _MAX_QUEUED_LOOKUPS
        ),
        Lane.EMBED: LaneLimits(
            config.embed_max_batch, config.embed_wait_ms / 1e3, config.embed_max_queued
        ),
        Lane.INDEX: LaneLimits(config.lookup_max_batch, 0.0, INDEX_BATCH),
    }
    return EmbeddingThread(load, limits, config.embed_slice_tokens, config.top_k)
