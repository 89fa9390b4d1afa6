"""One replica as gateways see it: its state, its model, requests in and out, drain.

    LOADING ──► SERVING ◄──► RECOVERING          any ──► DRAINING
       └──────────► FAILED (tried again)

Owns the batcher; `shard_loop.py` connects it to the shard. Callers never wait for a client here.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass

from infermesh.config import SchedulerConfig
from infermesh.errors import Draining, MeshError, ModelLoading, ReplicaUnavailable
from infermesh.telemetry import logs
from services.scheduler.batcher import Batcher, BatcherSettings
from services.scheduler.eviction import NUM_CLASSES
from services.scheduler.intake import ModelFacts, Submission
from services.scheduler.orphans import KeptLimits, KeptRequests
from services.scheduler.sequence import MoveReason, Request, Sink
from services.scheduler.shard_link import LoadedModel
from services.scheduler.stats import Stats

_LOADING_RETRY_S = 2.0
# A device that is back within it keeps its requests.
_LOST_AFTER_S = 0.25
_log = logs.get(__name__)


class State(enum.IntEnum):
    """Where the replica is in its life; the numbers are the wire's."""

    LOADING = 1
    SERVING = 2
    RECOVERING = 3
    DRAINING = 4
    FAILED = 5


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the replica is."""

    num_running: int = 0
    num_waiting: int = 0
    num_tokens_waiting: int = 0
    kv_cache_usage: float = 0.0
    tokens_per_second: float = 0.0


class Signal:
    """Wakes everyone who waits for the next change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        event, self._event = self._event, asyncio.Event()
        event.set()

    def next(self) -> asyncio.Event:
        """The event of the next change; take it before looking, and no change is missed."""
        return self._event


class Replica:
    """State and requests of one replica."""

    def __init__(
        self,
        config: SchedulerConfig,
        stats: Stats | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        # Its state, or which requests run and wait; not what moves with every step.
        self.changed = Signal()
        # Called when the replica stops: sessions have to end.
        self.on_stop: set[Callable[[], None]] = set()
        self.is_stopped = False
        # Set when there may be something new to plan.
        self.work = asyncio.Event()
        self.model: LoadedModel | None = None
        self.batcher: Batcher | None = None
        self.error: MeshError | None = None
        self.load_stage = "connecting"
        self.load_progress = 0.0
        self.stats = stats if stats is not None else Stats(clock)
        limits = KeptLimits(
            config.resume_grace_s, config.resume_max_requests, config.resume_max_tokens
        )
        self.kept = KeptRequests(limits, self.stats, clock)
        self._clock = clock
        self._state = State.LOADING
        self._is_draining = False
        # Why every request had better go on elsewhere, as long as it had.
        self._offer: MoveReason | None = None
        self._deadline_moved = asyncio.Event()
        self._num_requests = (0, 0)

    @property
    def state(self) -> State:
        return State.DRAINING if self._is_draining else self._state

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def fingerprint(self) -> str:
        """Of the model served; empty before the first is loaded."""
        return "" if self.model is None else self.model.manifest.model_fingerprint

    def move_to(self, state: State, error: MeshError | None = None) -> None:
        """A step in the replica's life; draining covers all."""
        if state is not self._state:
            _log.info("replica", extra={"state": state.name.lower()})
        self._state = state
        self.error = error
        self.stats.served.serving(self.state is State.SERVING)
        if state is not State.RECOVERING and not self._is_draining:
            self._offer = None
        self.changed.notify()

    def submit(self, submission: Submission, sink: Sink) -> Request:
        """Accepts a request, told to `sink`.

        Raises:
            MeshError: it is refused, and why.
        """
        try:
            batcher = self._accepting()
            request = batcher.submit(submission, sink)
        except MeshError as error:
            self.stats.refused(error.code)
            _log.debug(  # not louder: many in an overload, and the gateway tells what came of it
                "request refused",
                extra={
                    "request_id": submission.request_id,
                    "traceparent": submission.traceparent,
                    "error": error.code,
                },
            )
            raise
        self.offer(request)
        if submission.remaining_s is not None:
            self._deadline_moved.set()
        if request.resumable is not None:
            self.kept.add(request)
        self._touched()
        return request

    def cancel(self, request: Request, choices: Collection[int] = ()) -> None:
        """Ends a request, or these choices of it; harmless when they are over."""
        if self.batcher is not None:
            self.batcher.cancel(request, choices)
            self._touched()

    def adopt(self, model: LoadedModel) -> None:
        """The shard has loaded a model: the first, the same again, or another.

        Requests for another model can't go on: they end, and sessions have to be opened anew.
        """
        old, self.model = self.model, model
        fingerprint = model.manifest.model_fingerprint
        if old is not None and old.manifest.model_fingerprint == fingerprint:
            return
        if self.batcher is not None:
            self.fail_all(ReplicaUnavailable("the shard serves another model now"))
            self.kept.clear()
        manifest = model.manifest
        self.stats.served.model(manifest.model_id, manifest.dtype, manifest.quantization)
        facts = ModelFacts(
            model_id=manifest.model_id,
            fingerprint=fingerprint,
            max_model_len=manifest.max_model_len,
            vocab_size=manifest.vocab_size,
            eos_token_ids=frozenset(manifest.eos_token_ids),
            rope_switch_len=manifest.rope_switch_len,
        )
        config = self.config
        settings = BatcherSettings(
            window=config.window,
            lead_s=config.lead_ms / 1000,
            max_queue_tokens=config.max_queue_tokens,
            queue_shares={3: 1.0, 2: config.queue_share_normal, 1: config.queue_share_low},
            enable_prefix_caching=config.enable_prefix_caching,
            eviction_classes=1 if config.kv_eviction == "lru" else NUM_CLASSES,
            max_crashes_per_request=config.max_crashes_per_request,
            target_itl_s=config.target_itl_ms / 1000 if config.target_itl_ms else None,
        )
        self.batcher = Batcher(settings, facts, model.capacity, self.stats, self._clock)
        self.changed.notify()

    def stepped(self) -> None:
        """A step is over: there may be more to plan."""
        self.work.set()
        if self.batcher is not None:
            roster, before = self.batcher.roster, self._num_requests
            self._num_requests = (len(roster.ledger.running), len(roster.queue))
            # idle always: between two steps requests may have come and gone, or been cancelled
            if self._num_requests != before or self.batcher.is_idle:
                self.changed.notify()

    def fail_all(self, error: MeshError) -> None:
        """Ends every open request."""
        if self.batcher is not None:
            self.batcher.fail_all(error)
            self._touched()

    def device_lost(self) -> None:
        """Nobody knows when a recovering replica is back: its requests may go on elsewhere."""
        if self._state is State.RECOVERING and self._offer is None:
            self._offer_all(MoveReason.DEVICE_LOST)

    async def watch_recovery(self) -> None:
        """Offers the requests elsewhere where the device does not come back at once."""
        while True:
            await self._until(lambda: self._state is State.RECOVERING)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOST_AFTER_S):
                    await self._until(lambda: self._state is not State.RECOVERING)
            self.device_lost()
            await self._until(lambda: self._state is not State.RECOVERING)

    def load(self) -> Load:
        """A snapshot for gateways."""
        if self.batcher is None:
            return Load()
        roster = self.batcher.roster
        pool = roster.ledger.pool
        return Load(
            num_running=len(roster.ledger.running),
            num_waiting=len(roster.queue),
            num_tokens_waiting=roster.num_tokens_waiting(),
            kv_cache_usage=1 - pool.num_free / pool.num_blocks if pool.num_blocks else 0.0,
            tokens_per_second=self.batcher.throughput.tokens_per_second(self._clock()),
        )

    def max_num_seqs(self) -> int:
        """Sequences that can run at once."""
        if self.batcher is None:
            return self.config.max_num_seqs
        return self.batcher.roster.ledger.capacity.max_num_seqs

    async def watch_deadlines(self) -> None:
        """Ends requests when their time is over, in every state."""
        while True:
            self._deadline_moved.clear()
            due_s = self.batcher.next_deadline_s() if self.batcher is not None else None
            timeout_s = None if due_s is None else max(0.0, due_s - self._clock())
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._deadline_moved.wait()
            if self.batcher is not None:
                self.batcher.expire()
                self._touched()

    async def watch_orphans(self) -> None:
        """Ends the requests that no gateway came for in time."""
        while True:
            await self.kept.due()
            for request in self.kept.expire():
                self.cancel(request)
            self.changed.notify()

    async def empty(self, grace_s: float) -> int:
        """Refuses new requests, offers the open ones elsewhere and waits until none is left.

        Returns how many are, once the grace is over. Draining has no end, also where the caller
        does not wait for it.
        """
        if not self._is_draining:
            self._is_draining = True
            self.stats.served.serving(False)
            self._offer_all(MoveReason.DRAINING)
            self.changed.notify()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._until(lambda: self.batcher is None or self.batcher.is_idle)
        return 0 if self.batcher is None else len(self.batcher.roster.requests)

    async def drain(self, grace_s: float) -> None:
        """Empties the replica; what is left then ends DRAINING, and so do sessions."""
        await self.empty(grace_s)
        self.fail_all(Draining("the scheduler is stopping"))
        self.is_stopped = True
        for end_session in list(self.on_stop):
            end_session()

    def _accepting(self) -> Batcher:
        if self._is_draining:
            raise Draining("the scheduler is stopping")
        if self._state is State.FAILED:
            why = self.error.message if self.error is not None else "the model can't be served"
            raise ReplicaUnavailable(why)
        if self.batcher is None:
            raise ModelLoading("the model is being loaded", retry_after_s=_LOADING_RETRY_S)
        return self.batcher

    def offer(self, request: Request) -> None:
        """Tells who has just got this request that it had better go on elsewhere, if it had."""
        if self.batcher is not None and self._offer is not None and not request.is_over:
            self.batcher.offer([request], self._offer)

    def _offer_all(self, reason: MoveReason) -> None:
        self._offer = reason
        if self.batcher is not None:
            self.batcher.offer(self.batcher.roster.requests, reason)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while True:
            changed = self.changed.next()
            if condition():
                return
            await changed.wait()

    def _touched(self) -> None:
        self.work.set()
        self.changed.notify()
