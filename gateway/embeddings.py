"""Texts to vectors: one embedding request from the edge to the embedder, which the cache process
holds.

Both edges are in front of this; it knows neither. Texts are never cut.
"""

import re
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.cache.client import CacheClient, Embedder, EmbedderState, Vector
from gateway.identity import EMBEDDINGS
from gateway.pipeline import Pipeline
from gateway.request import Call, RequestId
from gateway.tokens import Usage
from infermesh.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest, ModelNotFound

MAX_TEXTS = 2048
# Per call to the embedder where it has not said its own limit.
_FALLBACK_TEXTS = 256
_TEXT_INDEX = re.compile(r"texts\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """One call of a client.

    Attributes:
        texts: named `input` or `input[i]` in refusals.
        is_list: the client sent a list, not one string.
        dimensions: None: the model's own.
    """

    model: str
    texts: tuple[str, ...]
    is_list: bool = True
    dimensions: int | None = None


@dataclass(frozen=True, slots=True)
class Embedded:
    """The answer; `headers` are the rate limits as they stood."""

    model_id: str
    vectors: Sequence[Vector]
    usage: Usage
    headers: Mapping[str, str]


class Embeddings:
    """Answers embedding requests.

    Args:
        cache: None where no cache process, and so no embedder, is configured.
        timeout_s: of a request whose client sets no deadline.
    """

    def __init__(self, cache: CacheClient | None, pipeline: Pipeline, timeout_s: float) -> None:
        self._cache = cache
        self._pipeline = pipeline
        self._timeout_s = timeout_s

    def models(self) -> list[Embedder]:
        """The embedder, once it can answer."""
        found = self._cache.embedder if self._cache is not None else None
        return [found] if found is not None and found.state is EmbedderState.READY else []

    def model_of(self, request_id: RequestId) -> str:
        """The embedder that a request was found to mean; empty where there is none."""
        return self._pipeline.records.model_of(request_id)

    async def embed(self, request: EmbeddingRequest, call: Call) -> Embedded:
        """Takes a request through every stage.

        Raises:
            MeshError: it was refused, or the embedder can't.
        """
        async with self._pipeline.admitted(call, EMBEDDINGS) as (principal, record):
            cache, embedder = self._embedder(request.model)
            principal.require_model(request.model)
            record.model = embedder.model_id
            check(request, embedder)
            ticket = await self._pipeline.gate.admit(principal, most_tokens(request, embedder))
            try:
                vectors = await self._vectors(request, call, cache, embedder)
            except BaseException:
                ticket.cancel()
                raise
            record.usage = Usage(prompt_tokens=sum(vector.num_tokens for vector in vectors))
            ticket.settle(record)
            return Embedded(embedder.model_id, vectors, record.usage, ticket.headers)

    async def _vectors(
        self, request: EmbeddingRequest, call: Call, cache: CacheClient, embedder: Embedder
    ) -> list[Vector]:
        deadline = call.deadline or time.monotonic() + self._timeout_s
        size = embedder.max_texts or _FALLBACK_TEXTS
        vectors: list[Vector] = []
        for start in range(0, len(request.texts), size):
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise DeadlineExceeded("the request's time is over")
            texts = request.texts[start : start + size]
            try:
                vectors += await cache.embed(texts, call.request_id, call.traceparent, remaining_s)
            except ContextLengthExceeded as error:
                raise too_long(request, embedder, start, error) from None
        return vectors

    def _embedder(self, name: str) -> tuple[CacheClient, Embedder]:
        cache = self._cache
        if cache is None or cache.embedder is None or cache.embedder.model_id != name:
            raise ModelNotFound(
                f"The embedding model `{name}` does not exist or is not served here",
                param="model",
            )
        return cache, cache.embedder


def check(request: EmbeddingRequest, embedder: Embedder) -> None:
    """Raises InvalidRequest for what the embedder would not be asked."""
    if not 1 <= len(request.texts) <= MAX_TEXTS:
        raise InvalidRequest(
            f"input has {len(request.texts)} entries; between 1 and {MAX_TEXTS} are allowed",
            param="input",
        )
    for index, text in enumerate(request.texts):
        if not text:
            where = _where(request, index)
            raise InvalidRequest(f"{where} is empty; it must have text", param=where)
    own = embedder.dimensions
    if request.dimensions is not None and own and request.dimensions != own:
        raise InvalidRequest(
            f"dimensions is {request.dimensions}; {embedder.model_id} has {own}, and was not "
            "trained to be cut",
            param="dimensions",
        )


def most_tokens(request: EmbeddingRequest, embedder: Embedder) -> int:
    """What a request uses at most: a token per character and two special ones per text.

    Characters of the decomposed text: tokenizers take Hangul and accented letters apart.
    """
    sizes = (len(unicodedata.normalize("NFD", text)) + 2 for text in request.texts)
    longest = embedder.max_tokens
    return sum(min(size, longest) if longest else size for size in sizes)


def too_long(
    request: EmbeddingRequest, embedder: Embedder, start: int, error: ContextLengthExceeded
) -> ContextLengthExceeded:
    """The embedder's refusal of a text, in the client's terms."""
    found = _TEXT_INDEX.fullmatch(error.param or "")
    where = _where(request, start + int(found[1])) if found else "input"
    return ContextLengthExceeded(
        f"{where} is too long: {embedder.model_id} takes {embedder.max_tokens} tokens per text, "
        "special tokens included",
        param=where,
    )


def _where(request: EmbeddingRequest, index: int) -> str:
    return f"input[{index}]" if request.is_list else "input"
