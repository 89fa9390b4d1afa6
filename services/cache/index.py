"""Vectors by partition, searched exactly with FAISS. One thread owns it.

A partition holds what may be reused for one compatibility fingerprint in one sharing domain:
nothing else is ever compared with a query of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from services.cache.domain import EntryId, ScopedKey

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An entry near a query, by cosine."""

    entry_id: EntryId
    similarity: float


class SemanticIndex:
    """Inner product over unit vectors, exact. Made in the thread that uses it."""

    def __init__(self, dimensions: int) -> None:
        # Of this thread, as OpenMP counts. Searches are small: a second one would wait for a core
        # that the shard has.
        faiss.omp_set_num_threads(1)
        self._dimensions = dimensions
        self._partitions: dict[ScopedKey, Any] = {}

    def add(self, partition: ScopedKey, ids: Sequence[EntryId], vectors: Vectors) -> None:
        """Adds vectors [len(ids), dimensions] of unit length; the ids are new to the partition."""
        index = self._partitions.get(partition)
        if index is None:
            index = faiss.IndexIDMap(faiss.IndexFlatIP(self._dimensions))
            self._partitions[partition] = index
        index.add_with_ids(np.ascontiguousarray(vectors, np.float32), np.asarray(ids, np.int64))

    def remove(self, partition: ScopedKey, ids: Sequence[EntryId]) -> None:
        """Removes what is there of `ids`."""
        index = self._partitions.get(partition)
        if index is None:
            return
        index.remove_ids(np.asarray(ids, np.int64))
        if index.ntotal == 0:
            del self._partitions[partition]

    def clear(self) -> None:
        """Removes everything."""
        self._partitions.clear()

    def search(self, partition: ScopedKey, vector: Vectors, k: int) -> tuple[Neighbour, ...]:
        """The k nearest of one partition, nearest first."""
        index = self._partitions.get(partition)
        if index is None:
            return ()
        similarities, ids = index.search(vector.reshape(1, -1), min(k, index.ntotal))
        return tuple(
            Neighbour(EntryId(int(one)), float(similarity))
            for one, similarity in zip(ids[0], similarities[0], strict=True)
            if one >= 0
        )
