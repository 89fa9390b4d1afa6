"""An embedder whose passes a test can hold: a word is a dimension."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence

import numpy as np

from services.cache.embedding import EmbedderFacts
from services.cache.index import Vectors

DIMENSIONS = 64
MAX_TOKENS = 32


class WordEmbedder:
    """Counts words. `passes` records the sizes of the passes, in order."""

    def __init__(self) -> None:
        self.facts = EmbedderFacts("words", "print-of-words", DIMENSIONS, MAX_TOKENS)
        self.passes: list[list[int]] = []
        self.is_open = threading.Event()
        self.is_open.set()
        self.has_begun = threading.Event()

    def hold(self) -> None:
        """The next pass hangs until `release`."""
        self.has_begun.clear()
        self.is_open.clear()

    def release(self) -> None:
        self.is_open.set()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [[zlib.crc32(w.casefold().strip("?").encode()) for w in t.split()] for t in texts]

    def truncate(self, token_ids: list[int]) -> list[int]:
        return token_ids[:MAX_TOKENS]

    def encode(self, batch: Sequence[Sequence[int]]) -> Vectors:
        self.passes.append([len(ids) for ids in batch])
        self.has_begun.set()
        assert self.is_open.wait(30)
        vectors = np.zeros((len(batch), DIMENSIONS), np.float32)
        for row, ids in enumerate(batch):
            for one in ids:
                vectors[row, one % DIMENSIONS] += 1.0
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
