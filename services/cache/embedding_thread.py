"""The one thread that owns the embedding model and the index.

It runs what `batching.BatchQueue` gives it in slices of bounded cost, and looks for lookups between
two slices of bulk work. The event loop hands it jobs and gets their futures resolved.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence

from infermesh.errors import Internal, MeshError
from infermesh.telemetry import logs, metrics
from services.cache.batching import BatchQueue, Lane, LaneLimits
from services.cache.embedding import Embedded, Embedder, EmbedderFacts, Job, State
from services.cache.index import SemanticIndex, Vectors

# Texts whose vectors are kept: a miss's question comes back as the entry to store.
_MAX_REMEMBERED = 2048

_log = logs.get(__name__)
_batch_size = metrics.histogram(
    "cache_embed_batch_texts",
    "Texts embedded in one forward pass.",
    ("lane",),
    buckets=(1, 2, 4, 8, 16, 32, 64),
)
_seconds = metrics.histogram("cache_embed_seconds", "Seconds of one forward pass.", ("lane",))

Result = Embedded | MeshError


class EmbeddingThread:
    """Started once; the model is loaded in the thread."""

    def __init__(
        self,
        load: Callable[[], Embedder],
        limits: Mapping[Lane, LaneLimits],
        slice_tokens: int,
        top_k: int,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load = load
        self._queue: BatchQueue[Job] = BatchQueue(limits)
        self._slice_tokens = slice_tokens
        self._top_k = top_k
        self._now_s = now_s
        self._wake = threading.Condition()
        self._posts: list[Callable[[SemanticIndex], None]] = []
        self._remembered: OrderedDict[str, tuple[int, Vectors]] = OrderedDict()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False
        self._busy_since_s: float | None = None
        self._embedder: Embedder | None = None
        self._index: SemanticIndex | None = None
        self.state = State.LOADING
        self.error: MeshError | None = None
        # A daemon: a model that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="cache-embedder", daemon=True)

    @property
    def facts(self) -> EmbedderFacts | None:
        """Known once the model is loaded."""
        return self._embedder.facts if self._embedder is not None else None

    def start(self, on_ready: Callable[[], None]) -> None:
        """Starts the thread; `on_ready` runs on the loop when the model is there."""
        self._loop = asyncio.get_running_loop()
        self._on_ready = on_ready
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Ends the thread after the slice it is at; blocks. False where that took too long."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def submit(self, lane: Lane, *jobs: Job) -> bool:
        """Queues all of `jobs`, or none where the lane has no room for them."""
        with self._wake:
            if self._queue.room(lane) < len(jobs):
                return False
            now_s = self._now_s()
            for job in jobs:
                self._queue.push(lane, job, now_s)
            self._wake.notify()
            return True

    def post(self, change: Callable[[SemanticIndex], None]) -> None:
        """Changes the index before anything else runs; in order."""
        with self._wake:
            if self.state in (State.LOADING, State.READY):
                self._posts.append(change)
                self._wake.notify()

    def busy_s(self) -> float:
        """How long the pass under way has taken; 0 where none is."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else self._now_s() - since_s

    def _run(self) -> None:
        try:
            self._embedder = self._load()
        except MeshError as error:
            self._fail(error)
            return
        except Exception as exc:  # whatever the libraries raise, the exact tier goes on
            self._fail(Internal(f"the embedder can't be loaded: unexpected {type(exc).__name__}"))
            return
        self._index = SemanticIndex(self._embedder.facts.dimensions)
        self.state = State.READY
        _log.info("the embedder is ready", extra={"model": self._embedder.facts.model_id})
        self._on_loop(self._on_ready)
        while self._wait_and_run():
            pass

    def _fail(self, error: MeshError) -> None:
        with self._wake:
            self.error = error
            self.state = State.FAILED
            self._posts.clear()
        _log.error("no semantic tier: %s", error)

    def _wait_and_run(self) -> bool:
        with self._wake:
            while True:
                if self._stopping:
                    return False
                batch = self._queue.take(self._now_s())
                if batch is not None or self._posts:
                    break
                self._wake.wait(self._queue.wait_s(self._now_s()))
        if batch is None:
            self._change_index()
        else:
            self._run_batch(*batch)
        return True

    def _change_index(self) -> None:
        with self._wake:
            posts, self._posts = self._posts, []
        assert self._index is not None
        for change in posts:
            change(self._index)

    def _run_batch(self, lane: Lane, jobs: Sequence[Job]) -> None:
        self._change_index()
        jobs = [job for job in jobs if not job.future.cancelled()]
        try:
            fresh = self._without_known(jobs)
            for part in _slices(fresh, self._slice_tokens):
                if lane is not Lane.LOOKUP:
                    self._run_lookups()
                self._run_slice(lane, part)
        except Exception as exc:  # the jobs end with it, the thread goes on
            _log.exception("embedding failed")
            error = Internal(f"embedding failed: unexpected {type(exc).__name__}")
            self._resolve([(job, error) for job in jobs])

    def _run_lookups(self) -> None:
        while True:
            with self._wake:
                batch = self._queue.take_lane(Lane.LOOKUP)
            if batch is None:
                return
            self._run_batch(*batch)

    def _without_known(self, jobs: Sequence[Job]) -> list[Job]:
        """Answers what needs no pass; the rest, tokenised."""
        assert self._embedder is not None
        done: list[tuple[Job, Result]] = []
        unknown: list[Job] = []
        for job in jobs:
            known = self._remembered.get(job.text)
            if known is None:
                unknown.append(job)
            else:
                self._remembered.move_to_end(job.text)
                done.append((job, self._finish(job, *known)))
        rows = self._embedder.tokenize([job.text for job in unknown]) if unknown else []
        fresh = []
        for job, job.token_ids in zip(unknown, rows, strict=True):
            if len(job.token_ids) > self._embedder.facts.max_tokens and not job.allow_truncation:
                done.append((job, Embedded(len(job.token_ids), None)))
            else:
                fresh.append(job)
        self._resolve(done)
        return fresh

    def _run_slice(self, lane: Lane, jobs: Sequence[Job]) -> None:
        assert self._embedder is not None
        max_tokens = self._embedder.facts.max_tokens
        rows = [
            self._embedder.truncate(job.token_ids)
            if len(job.token_ids) > max_tokens
            else job.token_ids
            for job in jobs
        ]
        self._busy_since_s = start_s = self._now_s()
        try:
            vectors = self._embedder.encode(rows)
        finally:
            self._busy_since_s = None
        _batch_size.labels(lane.name.lower()).observe(len(jobs))
        _seconds.labels(lane.name.lower()).observe(self._now_s() - start_s)
        done: list[tuple[Job, Result]] = []
        for job, row, vector in zip(jobs, rows, vectors, strict=True):
            is_truncated = len(row) < len(job.token_ids)
            one = vector.copy()  # not a view that keeps the whole batch
            if not is_truncated:
                self._remember(job.text, len(row), one)
            done.append((job, self._finish(job, len(row), one, is_truncated)))
        self._resolve(done)

    def _remember(self, text: str, num_tokens: int, vector: Vectors) -> None:
        self._remembered[text] = (num_tokens, vector)
        if len(self._remembered) > _MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    def _finish(
        self, job: Job, num_tokens: int, vector: Vectors, is_truncated: bool = False
    ) -> Embedded:
        assert self._index is not None
        if job.partition is None:
            return Embedded(num_tokens, vector, is_truncated)
        if job.entry_id is not None:
            self._index.add(job.partition, [job.entry_id], vector.reshape(1, -1))
            return Embedded(num_tokens, vector)
        neighbours = self._index.search(job.partition, vector, self._top_k)
        return Embedded(num_tokens, vector, neighbours=neighbours)

    def _resolve(self, done: list[tuple[Job, Result]]) -> None:
        if done:
            self._on_loop(lambda: _set_results(done))

    def _on_loop(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(call)


def _set_results(done: list[tuple[Job, Result]]) -> None:
    for job, result in done:
        if job.future.done():
            continue
        if isinstance(result, MeshError):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)


def _slices(jobs: Sequence[Job], slice_tokens: int) -> Iterator[list[Job]]:
    """Groups of like length whose padded size is within `slice_tokens`, one job at least."""
    part: list[Job] = []
    for job in sorted(jobs, key=lambda one: len(one.token_ids)):
        if part and len(job.token_ids) * (len(part) + 1) > slice_tokens:
            yield part
            part = []
        part.append(job)
    if part:
        yield part
