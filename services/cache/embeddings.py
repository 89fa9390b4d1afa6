"""Embeddings for clients: validated, batched with other calls, behind lookups."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from infermesh.config import CacheConfig
from infermesh.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelLoadFailed,
    ModelLoading,
    QueueFull,
)
from services.cache.batching import Lane
from services.cache.embedding import Embedded, EmbedderFacts, Job, State
from services.cache.embedding_thread import EmbeddingThread

_LOADING_RETRY_S = 2.0
_FULL_RETRY_S = 1.0


class Embeddings:
    """The bulk side of the embedder. Runs on the event loop."""

    def __init__(self, config: CacheConfig, thread: EmbeddingThread | None) -> None:
        self._config = config
        self._thread = thread

    @property
    def state(self) -> State:
        """Of the embedder."""
        return State.DISABLED if self._thread is None else self._thread.state

    @property
    def facts(self) -> EmbedderFacts | None:
        """Known once it is ready."""
        return None if self._thread is None else self._thread.facts

    async def embed(self, texts: Sequence[str], *, allow_truncation: bool) -> list[Embedded]:
        """One result per text, each with a vector. Cancelling drops what has not begun.

        Raises:
            MeshError: as the proto's Embed says.
        """
        thread = self._ready()
        self._check(texts)
        loop = asyncio.get_running_loop()
        jobs = [Job(text, loop.create_future(), allow_truncation) for text in texts]
        if not thread.submit(Lane.EMBED, *jobs):
            raise QueueFull(
                f"{self._config.embed_max_queued} texts are waiting to be embedded",
                retry_after_s=_FULL_RETRY_S,
            )
        results = await asyncio.gather(*(job.future for job in jobs), return_exceptions=True)
        embedded: list[Embedded] = []
        for index, result in enumerate(results):
            if isinstance(result, BaseException):
                raise result
            if result.vector is None:
                raise self._too_long(index, result.num_tokens)
            embedded.append(result)
        return embedded

    def _ready(self) -> EmbeddingThread:
        thread = self._thread
        if thread is None:
            raise ModelLoadFailed("embeddings are switched off: cache.embedder is none")
        if thread.state is State.LOADING:
            raise ModelLoading("the embedder is being loaded", retry_after_s=_LOADING_RETRY_S)
        if thread.error is not None:
            raise thread.error
        return thread

    def _check(self, texts: Sequence[str]) -> None:
        if not 1 <= len(texts) <= self._config.embed_max_texts:
            raise InvalidRequest(
                f"there are {len(texts)} texts; 1 to {self._config.embed_max_texts} are allowed",
                param="texts",
            )
        for index, text in enumerate(texts):
            if not text:
                raise InvalidRequest(f"text {index} is empty", param=f"texts[{index}]")

    def _too_long(self, index: int, num_tokens: int) -> ContextLengthExceeded:
        facts = self.facts
        assert facts is not None
        return ContextLengthExceeded(
            f"text {index} is of {num_tokens} tokens; the embedder takes {facts.max_tokens}",
            param=f"texts[{index}]",
        )
