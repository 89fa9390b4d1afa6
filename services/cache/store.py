"""Kept answers in memory: by exact key and by id, with absolute time to live and a byte budget.

Owns no clock, file or index: time is an argument, and every change returns the entries it removed.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.cache.domain import Entry, EntryId, Keys, ScopedKey
from services.cache.wordings import Wordings

if TYPE_CHECKING:
    from services.cache.index import Vectors

# Keys, ids, table slots and the taken-apart wording of one entry, measured.
_OVERHEAD_BYTES = 3000
_SAMPLE = 32
# Before its first hours are over, an entry's hit rate is not known: it counts as if this old.
_MIN_AGE_S = 600.0


@dataclass(slots=True, eq=False)
class Held:
    """An entry with what changes about it."""

    entry: Entry
    num_hits: int = 0
    vector: Vectors | None = None
    # Index in the list that eviction samples from.
    place: int = 0

    @property
    def num_bytes(self) -> int:
        """What it takes in memory; the vector stands here and in the index."""
        vector_bytes = 0 if self.vector is None else 2 * self.vector.nbytes
        entry = self.entry
        return _OVERHEAD_BYTES + len(entry.answer.payload) + 4 * len(entry.text) + vector_bytes

    def worth(self, now_s: float) -> float:
        """Seconds of compute that keeping it saves, per second and byte."""
        age_s = max(now_s - self.entry.created_s, _MIN_AGE_S)
        hit_rate = (self.num_hits + 1) / age_s
        return max(self.entry.answer.compute_s, 1e-3) * hit_rate / self.num_bytes


class Store:
    """All entries of the process."""

    def __init__(self, max_bytes: int, rng: random.Random | None = None) -> None:
        self._max_bytes = max_bytes
        self._rng = rng or random.Random()
        self._by_id: dict[EntryId, Held] = {}
        self._by_key: dict[ScopedKey, EntryId] = {}
        self._places: list[EntryId] = []
        self._expiries: list[tuple[float, EntryId]] = []
        self._in_partition: Counter[ScopedKey] = Counter()
        self.wordings = Wordings()
        self.num_bytes = 0
        # Those with a vector: what can be found by meaning.
        self.num_indexed = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Held]:
        return iter(self._by_id.values())

    def get(self, entry_id: EntryId, now_s: float) -> Held | None:
        """A living entry."""
        held = self._by_id.get(entry_id)
        return held if held is not None and held.entry.expires_s > now_s else None

    def find(self, exact: ScopedKey, now_s: float) -> Held | None:
        """The living entry of an exact key."""
        entry_id = self._by_key.get(exact)
        return None if entry_id is None else self.get(entry_id, now_s)

    def has_partition(self, partition: ScopedKey) -> bool:
        """Whether anything could be found there by meaning."""
        return self._in_partition[partition] > 0

    def put(self, entry: Entry, num_hits: int = 0) -> list[Entry]:
        """Adds an entry; returns the one of the same exact key whose place it takes."""
        replaced = self._by_key.get(entry.keys.exact)
        removed = self.remove([replaced]) if replaced is not None else []
        held = Held(entry, num_hits, place=len(self._places))
        self._by_id[entry.id] = held
        self._by_key[entry.keys.exact] = entry.id
        self._places.append(entry.id)
        heapq.heappush(self._expiries, (entry.expires_s, entry.id))
        self.num_bytes += held.num_bytes
        if entry.is_semantic:
            self._in_partition[entry.keys.partition] += 1
            self.wordings.add(entry.keys.partition, entry.id, entry.text)
        return removed

    def attach(self, entry_id: EntryId, vector: Vectors) -> bool:
        """Notes the vector of an entry; False where the entry is gone."""
        held = self._by_id.get(entry_id)
        if held is None:
            return False
        self.num_indexed += held.vector is None
        self.num_bytes -= held.num_bytes
        held.vector = vector
        self.num_bytes += held.num_bytes
        return True

    def remove(self, ids: Iterable[EntryId]) -> list[Entry]:
        """Removes what is there of `ids`."""
        removed = []
        for entry_id in ids:
            held = self._by_id.pop(entry_id, None)
            if held is not None:
                self._forget(held)
                removed.append(held.entry)
        return removed

    def expire(self, now_s: float) -> list[Entry]:
        """Removes what has outlived its time."""
        ids = []
        while self._expiries and self._expiries[0][0] <= now_s:
            ids.append(heapq.heappop(self._expiries)[1])
        return self.remove(ids)

    def evict(self, now_s: float) -> list[Entry]:
        """Removes the least worthy of a sample, until the budget is kept."""
        removed: list[Entry] = []
        while self.num_bytes > self._max_bytes and self._by_id:
            count = min(_SAMPLE, len(self._places))
            sample = (self._by_id[one] for one in self._rng.sample(self._places, count))
            worst = min(sample, key=lambda held: held.worth(now_s))
            removed += self.remove([worst.entry.id])
        return removed

    def select(self, wanted: Callable[[Keys], bool]) -> list[EntryId]:
        """Ids of the entries whose keys satisfy `wanted`."""
        return [held.entry.id for held in self if wanted(held.entry.keys)]

    def _forget(self, held: Held) -> None:
        entry = held.entry
        if self._by_key.get(entry.keys.exact) == entry.id:
            del self._by_key[entry.keys.exact]
        last = self._places.pop()
        if last != entry.id:
            self._places[held.place] = last
            self._by_id[last].place = held.place
        self.num_bytes -= held.num_bytes
        self.num_indexed -= held.vector is not None
        if entry.is_semantic:
            self._in_partition[entry.keys.partition] -= 1
            self.wordings.remove(entry.keys.partition, entry.id)
            if not self._in_partition[entry.keys.partition]:
                del self._in_partition[entry.keys.partition]
        if len(self._expiries) > 2 * len(self._by_id) + 1024:  # mostly of entries that are gone
            self._expiries = [(h.entry.expires_s, h.entry.id) for h in self]
            heapq.heapify(self._expiries)
