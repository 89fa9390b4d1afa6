"""Writing: which answers are kept, how long, and which are taken out again.

Answers are embedded in the background, after they are kept: a store never waits for the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from infermesh.config import CacheConfig
from infermesh.errors import Internal, MeshError, NotFound
from infermesh.telemetry import metrics
from services.cache import courtesy
from services.cache.batching import Lane
from services.cache.domain import Draft, Entry, EntryId, Keys, StoreOutcome
from services.cache.embedding import Job, State
from services.cache.embedding_thread import EmbeddingThread
from services.cache.gates import is_volatile, semantic_gate
from services.cache.holdings import Holdings

INDEX_BATCH = 16
_WORDS_BATCH = 4
_HOUSEKEEPING_S = 5.0
_RETRY_DISK_S = 30.0

_stores = metrics.counter(
    "cache_stores_total", "Answers offered, by what became of them.", ("outcome",)
)


class Keeper:
    """Changes what is held. Runs on the event loop."""

    def __init__(
        self,
        config: CacheConfig,
        holdings: Holdings,
        thread: EmbeddingThread | None,
        now_s: Callable[[], float],
    ) -> None:
        self._config = config
        self._holdings = holdings
        self._thread = thread
        self._now_s = now_s
        self._has_work = asyncio.Event()
        self._has_words = asyncio.Event()
        self._has_words.set()  # those that were restored

    def keep(self, draft: Draft) -> StoreOutcome:
        """Keeps an answer, unless it is there, too large, in quarantine or outdated."""
        outcome = self._keep(draft)
        self.count(outcome)
        return outcome

    def count(self, outcome: StoreOutcome) -> None:
        """Counts an offer."""
        _stores.labels(outcome.value).inc()

    def embedder_is_ready(self) -> None:
        """Called once, on the loop."""
        self._holdings.embedder_is_ready()
        self._has_work.set()

    async def invalidate(self, wanted: Callable[[Keys], bool] | None, *, dry_run: bool) -> int:
        """Removes the entries whose keys satisfy `wanted`, all by a new epoch for None; how many.

        Answers whose generation began before are not kept after it.

        Raises:
            Internal: they are out of use, but the disk does not know it.
        """
        if dry_run:
            store = self._holdings.store
            return len(store) if wanted is None else len(store.select(wanted))
        if wanted is None:
            count = self._holdings.raise_epoch()
        else:
            count = self._holdings.invalidate(wanted)
        await self._make_durable()
        return count

    async def invalidate_entry(self, entry_id: EntryId, *, dry_run: bool) -> int:
        """The same for one entry and its exact request; 0 where it is not there."""
        held = self._holdings.store.get(entry_id, self._now_s())
        if held is None:
            return 0
        exact = held.entry.keys.exact
        return await self.invalidate(lambda keys: keys.exact == exact, dry_run=dry_run)

    async def report_bad_hit(self, entry_id: EntryId, sharing_domain: str) -> bool:
        """Quarantines an entry; False where it is in quarantine.

        Raises:
            NotFound: no such entry in the domain ("": any).
            Internal: it is out of use, but the disk does not know it.
        """
        now_s = self._now_s()
        held = self._holdings.store.get(entry_id, now_s)
        domain = held.entry.keys.sharing_domain if held else None
        if held is None:
            domain = self._holdings.quarantine.domain_of(entry_id)
        if domain is None or sharing_domain not in ("", domain):
            raise NotFound("there is no such cache entry", param="entry_id")
        if held is None:
            return False
        self._holdings.keep_out(held.entry, now_s + self._config.quarantine_s)
        await self._make_durable()
        return True

    async def index_entries(self) -> None:
        """Embeds what is kept, in the background; runs until cancelled."""
        while True:
            await self._has_work.wait()
            self._has_work.clear()
            while self._thread is not None and self._thread.state is State.READY:
                entries = self._next_to_embed()
                if not entries:
                    break
                await self._index(entries)

    async def take_entries_apart(self) -> None:
        """Readies the words of what is kept, a few at a time; runs until cancelled."""
        while True:
            await self._has_words.wait()
            self._has_words.clear()
            while self._holdings.store.wordings.work(_WORDS_BATCH):  # noqa: ASYNC110
                await asyncio.sleep(0)  # lookups come in between

    async def keep_house(self) -> None:
        """Ends what has expired and writes snapshots when due; runs until cancelled."""
        idle_s = 0.0
        while True:
            await asyncio.sleep(_HOUSEKEEPING_S)
            idle_s += _HOUSEKEEPING_S
            self._holdings.expire()
            if self.snapshot_is_due(idle_s):
                self._holdings.snapshot()
                idle_s = 0.0

    def snapshot_is_due(self, since_s: float) -> bool:
        """By age, by the log's length, or because the disk failed."""
        journal = self._holdings.journal
        if journal is None:
            return False
        if not journal.is_durable:
            return since_s >= _RETRY_DISK_S
        is_old = since_s >= self._config.snapshot_interval_s
        is_long = journal.num_bytes >= self._config.snapshot_log_bytes
        return self._holdings.has_changed and (is_old or is_long)

    def _keep(self, draft: Draft) -> StoreOutcome:
        now_s = self._now_s()
        exact = draft.keys.exact
        if len(draft.answer.payload) + len(draft.text) > self._config.max_entry_bytes:
            return StoreOutcome.TOO_LARGE
        if self._holdings.quarantine.holds(exact, now_s):
            return StoreOutcome.QUARANTINED
        if self._holdings.invalidations.void(draft.mark, draft.keys):
            return StoreOutcome.OUTDATED
        if not draft.replace and self._holdings.store.find(exact, now_s) is not None:
            return StoreOutcome.DUPLICATE
        ttl_s = self._config.ttl_s
        if is_volatile(draft.text):
            ttl_s = min(ttl_s, self._config.volatile_ttl_s)
        if draft.ttl_s is not None:
            ttl_s = min(ttl_s, draft.ttl_s)
        is_semantic = semantic_gate(draft.traits, draft.text) is None
        entry = Entry(
            self._holdings.new_id(),
            draft.keys,
            draft.text,
            draft.answer,
            now_s,
            now_s + ttl_s,
            is_semantic,
        )
        self._holdings.add(entry)
        if is_semantic:
            self._has_work.set()
            self._has_words.set()
        return StoreOutcome.STORED

    def _next_to_embed(self) -> list[Entry]:
        entries: list[Entry] = []
        waiting, now_s = self._holdings.to_embed, self._now_s()
        while waiting and len(entries) < INDEX_BATCH:
            held = self._holdings.store.get(waiting.popleft(), now_s)
            if held is not None:
                entries.append(held.entry)
        return entries

    async def _index(self, entries: list[Entry]) -> None:
        assert self._thread is not None
        loop = asyncio.get_running_loop()
        jobs = [
            Job(
                courtesy.core(entry.text),
                loop.create_future(),
                partition=entry.keys.partition,
                entry_id=entry.id,
            )
            for entry in entries
        ]
        if not self._thread.submit(Lane.INDEX, *jobs):
            return
        for entry, job in zip(entries, jobs, strict=True):
            try:
                embedded = await job.future
            except MeshError:  # it stays in the exact tier; the thread has said why
                continue
            if embedded.vector is not None:
                self._holdings.attach(entry, embedded.vector)

    async def _make_durable(self) -> None:
        journal = self._holdings.journal
        if journal is not None and not await journal.synced():
            raise Internal(
                "the entries are out of use, but this can't be written to disk: "
                "they would be back after a restart"
            )
