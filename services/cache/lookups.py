"""The climb of one lookup: bypass, exact, gates, embedding, index, guard, threshold.

Every end of it is a decision with a reason. What can't be decided in time is a miss.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache

from infermesh.config import CacheConfig
from infermesh.errors import MeshError
from infermesh.telemetry import metrics
from services.cache import courtesy, wording
from services.cache.batching import Lane
from services.cache.domain import Decision, Found, Mark, Outcome, Query, Reason, miss
from services.cache.embedding import Embedded, Job, State
from services.cache.embedding_thread import EmbeddingThread
from services.cache.gates import semantic_gate
from services.cache.holdings import Holdings
from services.cache.ladder import Candidate, Policy, decide
from services.cache.store import Held

# A pass under way for this many deadlines hangs: lookups stop waiting for it.
_HANGS_AFTER_DEADLINES = 10

_lookups = metrics.counter(
    "cache_lookups_total", "Lookups by outcome and reason.", ("outcome", "reason")
)
_seconds = metrics.histogram("cache_lookup_seconds", "From query to decision.", ("outcome",))
_saved = metrics.counter("cache_hit_compute_seconds_total", "Computing that hits saved.")

analyse = lru_cache(maxsize=8192)(wording.analyse)


class Lookups:
    """Reads what is held. Runs on the event loop; embeds and searches in the thread."""

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
        self._deadline_s = config.lookup_deadline_ms / 1e3
        self.counts: Counter[tuple[Outcome, Reason]] = Counter()
        self.compute_s_saved = 0.0

    @property
    def mark(self) -> Mark:
        """Of an answer whose generation begins after a lookup that ends now."""
        return self._holdings.invalidations.mark

    def at_once(self, query: Query) -> Found | None:
        """The end of a lookup that needs no embedding; None where it goes on by meaning."""
        began_s = time.perf_counter()
        found = self._at_once(query)
        return None if found is None else self._count(found, began_s)

    async def by_meaning(self, query: Query) -> Found:
        """The rest of the climb, within the deadline."""
        began_s = time.perf_counter()
        return self._count(await self._by_meaning(query), began_s)

    def refuse_overload(self) -> Found:
        """A lookup that there is no room for."""
        return self._count(Found(miss(Reason.OVERLOADED)), time.perf_counter())

    def _at_once(self, query: Query) -> Found | None:
        if query.traits.no_cache:
            return Found(Decision(Outcome.BYPASS, Reason.NO_CACHE))
        now_s = self._now_s()
        held = self._holdings.store.find(query.keys.exact, now_s)
        is_too_old = held is not None and _is_too_old(held, query, now_s)
        if held is not None and not is_too_old:
            return self._hit(held, Decision(Outcome.HIT_EXACT, Reason.SAME_REQUEST), now_s)
        closed = Reason.TOO_OLD if is_too_old else semantic_gate(query.traits, query.text)
        if closed is None and not self._holdings.store.has_partition(query.keys.partition):
            closed = Reason.NO_CANDIDATE
        if closed is None:
            closed = self._embedder_is_away()
        if closed is None and self._config.words_first:
            words = analyse(query.text)
            closed = self._holdings.store.wordings.refuse(query.keys.partition, words)
        return None if closed is None else Found(miss(closed))

    def _embedder_is_away(self) -> Reason | None:
        if self._thread is None:
            return Reason.SEMANTIC_DISABLED
        if self._thread.state is State.LOADING:
            return Reason.EMBEDDER_LOADING
        hangs = self._thread.busy_s() > _HANGS_AFTER_DEADLINES * self._deadline_s
        if self._thread.state is State.FAILED or hangs:
            return Reason.EMBEDDER_FAILED
        return None

    async def _by_meaning(self, query: Query) -> Found:
        assert self._thread is not None
        job = Job(
            courtesy.core(query.text),
            asyncio.get_running_loop().create_future(),
            partition=query.keys.partition,
        )
        if not self._thread.submit(Lane.LOOKUP, job):
            return Found(miss(Reason.OVERLOADED))
        remaining_s = self._deadline_s
        if query.deadline_s is not None:
            remaining_s = min(remaining_s, query.deadline_s)
        try:
            async with asyncio.timeout(remaining_s):
                embedded = await job.future
        except TimeoutError:
            return Found(miss(Reason.DEADLINE))
        except MeshError:
            return Found(miss(Reason.EMBEDDER_FAILED))
        return self._choose(query, embedded)

    def _choose(self, query: Query, embedded: Embedded) -> Found:
        if embedded.vector is None:
            return Found(miss(Reason.TEXT_TOO_LONG))
        now_s = self._now_s()
        candidates = [
            Candidate(
                near.entry_id,
                near.similarity,
                analyse(held.entry.text),
                now_s - held.entry.created_s,
            )
            for near in embedded.neighbours
            if (held := self._holdings.store.get(near.entry_id, now_s)) is not None
            and held.entry.keys.partition == query.keys.partition
        ]
        policy = Policy(self._config.threshold, query.max_age_s)
        decision = decide(analyse(query.text), candidates, policy)
        if decision.entry_id is None:
            return Found(decision)
        held = self._holdings.store.get(decision.entry_id, now_s)
        assert held is not None
        return self._hit(held, decision, now_s)

    def _hit(self, held: Held, decision: Decision, now_s: float) -> Found:
        held.num_hits += 1
        self.compute_s_saved += held.entry.answer.compute_s
        _saved.inc(held.entry.answer.compute_s)
        similarity = 1.0 if decision.similarity is None else decision.similarity
        decision = Decision(decision.outcome, decision.reason, similarity, held.entry.id)
        return Found(decision, held.entry, max(0.0, now_s - held.entry.created_s))

    def _count(self, found: Found, began_s: float) -> Found:
        decision = found.decision
        self.counts[decision.outcome, decision.reason] += 1
        _lookups.labels(decision.outcome.value, decision.reason.value).inc()
        _seconds.labels(decision.outcome.value).observe(time.perf_counter() - began_s)
        return found


def _is_too_old(held: Held, query: Query, now_s: float) -> bool:
    return query.max_age_s is not None and now_s - held.entry.created_s > query.max_age_s
