"""Whether any kept question could pass the lexical guard, told from words alone, before anything is
embedded: most questions that nothing answers need no embedding.

Owns the wordings of the semantic entries. Refuses only what the guard would refuse.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TypeVar

from services.cache import guard
from services.cache.domain import EntryId, Reason, ScopedKey
from services.cache.wording import Wording, analyse

# A scan of more would cost more than it saves: the embedding decides.
_MAX_COMPARED = 64
_MAX_ENTRIES = 16_384
# Of what waits to be taken apart, as much as a lookup does itself.
_MAX_AT_LOOKUP = 8


# What the guard wants equal: numbers with their operators, and how often it is negated.
_Name = TypeVar("_Name")
_Key = tuple[tuple[str, ...], int]


def _key(wording: Wording) -> _Key:
    return wording.numbers, wording.num_negations


@dataclass(slots=True)
class _Partition:
    wordings: dict[EntryId, Wording] = field(default_factory=dict)
    by_key: dict[_Key, set[EntryId]] = field(default_factory=dict)
    by_word: dict[str, set[EntryId]] = field(default_factory=dict)
    # kept, and not taken apart yet
    waiting: dict[EntryId, str] = field(default_factory=dict)

    def put(self, entry_id: EntryId, wording: Wording) -> None:
        self.wordings[entry_id] = wording
        self.by_key.setdefault(_key(wording), set()).add(entry_id)
        for word in set(wording.content):
            self.by_word.setdefault(word, set()).add(entry_id)

    def pop(self, entry_id: EntryId) -> None:
        wording = self.wordings.pop(entry_id, None)
        if wording is not None:
            _discard(self.by_key, _key(wording), entry_id)
            for word in set(wording.content):
                _discard(self.by_word, word, entry_id)

    def likely(self, wording: Wording) -> set[EntryId]:
        """Entries with the same key and a word of each anchor."""
        found = set(self.by_key.get(_key(wording), ()))
        for words in guard.anchors(wording):
            if not found:
                break
            found &= set().union(*(self.by_word.get(word, ()) for word in words))
        return found

    def nearest(self, wording: Wording) -> EntryId | None:
        """The entry that shares most content words."""
        shared = Counter(
            entry_id for word in set(wording.content) for entry_id in self.by_word.get(word, ())
        )
        return shared.most_common(1)[0][0] if shared else None


def _discard(index: dict[_Name, set[EntryId]], name: _Name, entry_id: EntryId) -> None:
    ids = index[name]
    ids.discard(entry_id)
    if not ids:
        del index[name]


class Wordings:
    """The wordings of each partition's entries."""

    def __init__(self) -> None:
        self._partitions: dict[ScopedKey, _Partition] = {}
        self._waiting: deque[tuple[ScopedKey, EntryId]] = deque()

    def add(self, partition: ScopedKey, entry_id: EntryId, text: str) -> None:
        """An entry that can be found by meaning; it is taken apart later."""
        members = self._partitions.setdefault(partition, _Partition())
        members.waiting[entry_id] = text
        self._waiting.append((partition, entry_id))

    def remove(self, partition: ScopedKey, entry_id: EntryId) -> None:
        """It is gone."""
        members = self._partitions.get(partition)
        if members is None:
            return
        members.waiting.pop(entry_id, None)
        members.pop(entry_id)
        if not members.wordings and not members.waiting:
            del self._partitions[partition]

    def work(self, count: int) -> bool:
        """Takes some of what waits apart; False where nothing waited."""
        had_work = bool(self._waiting)
        for _ in range(min(count, len(self._waiting))):
            partition, entry_id = self._waiting.popleft()
            members = self._partitions.get(partition)
            if members is not None and entry_id in members.waiting:
                self._take_apart(members, entry_id)
        return had_work

    def refuse(self, partition: ScopedKey, wording: Wording) -> Reason | None:
        """What every entry of the partition would be refused for; None where one might do."""
        members = self._partitions.get(partition)
        if members is None:
            return Reason.NO_CANDIDATE
        if len(members.waiting) > _MAX_AT_LOOKUP or len(members.wordings) > _MAX_ENTRIES:
            return None
        for entry_id in list(members.waiting):
            self._take_apart(members, entry_id)
        likely = members.likely(wording)
        if len(likely) > _MAX_COMPARED:
            return None
        if any(guard.compare(wording, members.wordings[one]) is None for one in likely):
            return None
        nearest = members.nearest(wording)
        if nearest is not None:
            return guard.compare(wording, members.wordings[nearest])
        return Reason.NUMBERS_DIFFER if wording.numbers else Reason.CONTENT_DIFFERS

    def _take_apart(self, members: _Partition, entry_id: EntryId) -> None:
        members.put(entry_id, analyse(members.waiting.pop(entry_id)))
