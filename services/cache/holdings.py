"""Everything the cache holds: store, index, quarantine and log, kept in step.

The one place that changes them. Runs on the event loop; the index and the log follow in their own
threads, in the order of the changes.
"""

from __future__ import annotations

import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from infermesh.telemetry import logs, metrics
from services.cache import records
from services.cache.domain import Entry, EntryId, Keys, ScopedKey
from services.cache.embedding_thread import EmbeddingThread
from services.cache.index import SemanticIndex, Vectors
from services.cache.invalidations import Invalidations
from services.cache.journal import Journal
from services.cache.quarantine import Quarantine
from services.cache.recovery import Recovered
from services.cache.store import Held, Store

_log = logs.get(__name__)
_entries = metrics.gauge("cache_entries", "Answers held.")
_bytes = metrics.gauge("cache_bytes", "Memory of the answers held.")
_indexed = metrics.counter("cache_indexed_total", "Answers that meaning can find from then on.")
_removed_total = metrics.counter("cache_removed_total", "Answers that went, by why.", ("why",))


class Holdings:
    """State of the process. `journal` is None without a data folder, `thread` without embedder."""

    def __init__(
        self,
        store: Store,
        journal: Journal | None,
        thread: EmbeddingThread | None,
        now_s: Callable[[], float],
    ) -> None:
        self.store = store
        self.quarantine = Quarantine()
        self.invalidations = Invalidations()
        self.journal = journal
        self.epoch = 0
        self.num_corrupt = 0
        self.removed: Counter[str] = Counter()
        # Entries to embed, oldest first; those that are gone meanwhile are passed over.
        self.to_embed: deque[EntryId] = deque()
        self._thread = thread
        self._now_s = now_s
        self._recovered: dict[EntryId, records.Embedded] = {}
        self._changes_since_snapshot = 0

    def restore(self, recovered: Recovered) -> None:
        """Takes over what the files held, before anything else."""
        now_s = self._now_s()
        self.epoch, self.num_corrupt = recovered.epoch, recovered.num_corrupt
        for quarantined in recovered.quarantined:
            key = (
                quarantined.sharing_domain,
                quarantined.model_fingerprint,
                quarantined.exact_fingerprint,
            )
            self.quarantine.add(key, quarantined.until_s, EntryId(quarantined.id))
        for kept in recovered.kept.values():
            entry = records.to_entry(kept)
            if entry.expires_s > now_s and not self.quarantine.holds(entry.keys.exact, now_s):
                self.store.put(entry, kept.num_hits)
        self.store.evict(now_s)
        self._recovered = recovered.vectors
        if len(self.store):
            _log.info("the cache is warm", extra={"num_entries": len(self.store)})
        self._report()

    def embedder_is_ready(self) -> None:
        """Indexes what was embedded by this very model before, and asks for the rest."""
        facts = self._thread.facts if self._thread is not None else None
        assert facts is not None
        self.to_embed.clear()  # what was kept meanwhile is in the store, too
        found: dict[ScopedKey, list[Held]] = {}
        for held in self.store:
            kept = self._recovered.get(held.entry.id)
            if not held.entry.is_semantic or held.vector is not None:
                continue
            if kept is None or kept.embedder != facts.fingerprint:
                self.to_embed.append(held.entry.id)
                continue
            vector = np.frombuffer(kept.values, "<f4").astype(np.float32)
            if vector.shape == (facts.dimensions,):
                self.store.attach(held.entry.id, vector)
                found.setdefault(held.entry.keys.partition, []).append(held)
            else:
                self.to_embed.append(held.entry.id)
        self._recovered = {}
        for partition, members in found.items():
            self._post_add(partition, members)

    def new_id(self) -> EntryId:
        """Random: an id is never given twice, not even after records were lost."""
        return EntryId(secrets.randbits(62) | 1 << 62)

    def add(self, entry: Entry) -> None:
        """Keeps an entry; the least worthy ones may have to go for it."""
        replaced = self.store.put(entry)
        self._record(records.of_entry(entry))
        if entry.is_semantic and self._thread is not None:
            self.to_embed.append(entry.id)
        self._removed(replaced, "replaced")
        self._removed(self.store.evict(self._now_s()), "evicted")

    def attach(self, entry: Entry, vector: Vectors) -> None:
        """The embedding thread has indexed an entry."""
        facts = self._thread.facts if self._thread is not None else None
        assert facts is not None
        if not self.store.attach(entry.id, vector):  # it went while it was being embedded
            self._post_remove(entry.keys.partition, [entry.id])
            return
        _indexed.inc()
        values = vector.astype("<f4").tobytes()
        self._record(records.Embedded(entry.id, facts.fingerprint, values))
        self._removed(self.store.evict(self._now_s()), "evicted")

    def drop(self, ids: Iterable[EntryId], why: str) -> int:
        """Removes entries; how many there were."""
        removed = self.store.remove(ids)
        self._removed(removed, why)
        return len(removed)

    def expire(self) -> None:
        """Ends what has outlived its time."""
        now_s = self._now_s()
        self.quarantine.expire(now_s)
        self._removed(self.store.expire(now_s), "expired")

    def keep_out(self, entry: Entry, until_s: float) -> None:
        """Quarantines an entry's request and removes the entry."""
        domain, fingerprint, exact = entry.keys.exact
        self.quarantine.add(entry.keys.exact, until_s, entry.id)
        self._record(records.Quarantined(entry.id, exact, domain, fingerprint, until_s))
        self.drop([entry.id], "quarantined")

    def invalidate(self, covers: Callable[[Keys], bool]) -> int:
        """Voids entries of such keys, and all that began before; how many there were."""
        self.invalidations.add(covers)
        return self.drop(self.store.select(covers), "invalidated")

    def raise_epoch(self) -> int:
        """Voids every entry, and all that began before; how many there were."""
        self.epoch += 1
        self.invalidations.add(lambda _: True)
        count = len(self.store)
        self.store.remove([held.entry.id for held in list(self.store)])
        self.to_embed.clear()
        self._record(records.Epoch(self.epoch))
        self.removed["invalidated"] += count
        _removed_total.labels("invalidated").inc(count)
        if self._thread is not None:
            self._thread.post(SemanticIndex.clear)
        self._report()
        return count

    def snapshot(self) -> None:
        """Has the journal write the state as it is now."""
        if self.journal is None:
            return
        held = [(one.entry, one.num_hits, one.vector) for one in self.store]
        facts = self._thread.facts if self._thread is not None else None
        embedder = facts.fingerprint if facts is not None else ""
        waiting = dict(self._recovered)
        quarantined = [
            records.Quarantined(entry_id, key[2], key[0], key[1], until_s)
            for key, until_s, entry_id in self.quarantine
        ]
        epoch = self.epoch

        def state() -> Iterator[records.Record]:
            yield records.Epoch(epoch)
            yield from quarantined
            for entry, num_hits, vector in held:
                yield records.of_entry(entry, num_hits)
                if vector is not None:
                    values = vector.astype("<f4").tobytes()
                    yield records.Embedded(entry.id, embedder, values)
                elif entry.id in waiting:
                    yield waiting[entry.id]

        if self.journal.snapshot(state()):
            self._changes_since_snapshot = 0

    @property
    def has_changed(self) -> bool:
        """Since the last snapshot."""
        return self._changes_since_snapshot > 0

    def _record(self, *new: records.Record) -> None:
        self._changes_since_snapshot += len(new)
        if self.journal is not None:
            self.journal.append(*new)
        self._report()

    def _removed(self, entries: Sequence[Entry], why: str) -> None:
        if not entries:
            return
        self.removed[why] += len(entries)
        _removed_total.labels(why).inc(len(entries))
        self._record(records.Removed([entry.id for entry in entries]))
        if self._thread is None:
            return
        found: dict[ScopedKey, list[EntryId]] = {}
        for entry in entries:
            if entry.is_semantic:
                found.setdefault(entry.keys.partition, []).append(entry.id)
        for partition, ids in found.items():
            self._post_remove(partition, ids)

    def _post_add(self, partition: ScopedKey, members: list[Held]) -> None:
        assert self._thread is not None
        ids = [held.entry.id for held in members]
        vectors = np.stack([held.vector for held in members if held.vector is not None])
        self._thread.post(lambda index: index.add(partition, ids, vectors))

    def _post_remove(self, partition: ScopedKey, ids: list[EntryId]) -> None:
        assert self._thread is not None
        self._thread.post(lambda index: index.remove(partition, ids))

    def _report(self) -> None:
        _entries.set(len(self.store))
        _bytes.set(self.store.num_bytes)
