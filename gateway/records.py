"""What became of each request and where its time went: one record per request, the latest kept.

No prompts, keys or token ids.
"""

import asyncio
import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gateway import gen_ai, metrics
from gateway.cache.verdict import Verdict
from gateway.request import RequestId
from gateway.tokens import ChoiceTimings, Usage
from infermesh.errors import as_mesh_error
from infermesh.telemetry import logs

_log = logs.get(__name__)


@dataclass(slots=True)
class RequestRecord:
    """One request; times are seconds on the monotonic clock.

    Phases of the waterfall: auth, tokenize, cache (what asking it added), submit (routing and the
    way to the scheduler), queue, prefill, decode, and network, which is everything else.

    Attributes:
        cache: what became of the question whether an answer is there; None without a cache.
        resumed_from: the request that began the answer, where that was another one of its key.
        held_s: how long a token waited for the cache's word.
        refresh: brings usage and timings of a running request up to date, which not every token
            does.
    """

    request_id: RequestId
    endpoint: str
    started_at: float
    model: str = ""
    stream: bool = False
    status: str = "running"
    error: str | None = None
    num_choices: int = 0
    usage: Usage = field(default_factory=Usage)
    attempts: list[str] = field(default_factory=list)
    shared: bool = False
    resumed_from: RequestId | None = None
    authorised_at: float | None = None
    tokenized_at: float | None = None
    cache: Verdict | None = None
    asked_at: float | None = None
    looked_up_at: float | None = None
    held_s: float = 0.0
    admitted_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
    timings: ChoiceTimings | None = None
    refresh: Callable[[], None] | None = None

    def phases(self, now: float) -> dict[str, float]:
        """Milliseconds per phase, those that were reached."""
        found: dict[str, float] = {}
        last = self.started_at
        for name, at in (
            ("auth", self.authorised_at),
            ("tokenize", self.tokenized_at),
            ("cache", self.looked_up_at),
            ("submit", self.admitted_at),
        ):
            if at is not None:
                began = self.asked_at if name == "cache" else None
                found[name] = at - (last if began is None else began)
                last = at
        if self.held_s:
            found["cache"] += self.held_s
        if self.timings is not None:
            found["queue"] = self.timings.queue_s
            found["prefill"] = self.timings.prefill_s
            found["decode"] = self.timings.decode_s
        total = (self.ended_at or now) - self.started_at
        found["network"] = max(0.0, total - sum(found.values()))
        found["total"] = total
        return {name: seconds * 1e3 for name, seconds in found.items()}

    def waterfall(self, now: float) -> str:
        """The phases as a Server-Timing value (W3C Server Timing)."""
        return ", ".join(f"{name};dur={ms:.3f}" for name, ms in self.phases(now).items())

    def as_json(self, now: float) -> dict[str, Any]:
        """For the admin port."""
        if self.refresh is not None:
            self.refresh()
        return {
            "id": self.request_id,
            "endpoint": self.endpoint,
            "model": self.model,
            "stream": self.stream,
            "status": self.status,
            "error": self.error,
            "choices": self.num_choices,
            "usage": dataclasses.asdict(self.usage),
            "replicas": self.attempts,
            "single_flight": self.shared,
            "resumed_from": self.resumed_from,
            "cache": None if self.cache is None else self.cache.as_json(),
            "preemptions": self.timings.num_preemptions if self.timings else 0,
            "replays": self.timings.num_replays if self.timings else 0,
            "first_token_ms": _since(self.started_at, self.first_token_at),
            "waterfall_ms": self.phases(now),
        }


def _since(start: float, at: float | None) -> float | None:
    return None if at is None else (at - start) * 1e3


class Records:
    """The last `capacity` requests by id, running ones among them."""

    def __init__(self, clock: Callable[[], float], capacity: int = 1024) -> None:
        self._clock = clock
        self._capacity = capacity
        self._records: OrderedDict[RequestId, RequestRecord] = OrderedDict()

    def open(self, request_id: RequestId, endpoint: str) -> RequestRecord:
        """A record of a request that arrives now."""
        record = RequestRecord(request_id, endpoint, self._clock())
        self._records[request_id] = record
        self._records.move_to_end(request_id)
        while len(self._records) > self._capacity:
            self._records.popitem(last=False)
        return record

    def settle(self, record: RequestRecord, exc: BaseException | None) -> None:
        """Notes how a request ended, counts it and logs it; the first word stands."""
        if record.ended_at is not None:
            return
        record.ended_at = self._clock()
        if exc is None:
            record.status = "ok"
        elif isinstance(exc, (asyncio.CancelledError, GeneratorExit)):  # the client left
            record.status, record.error = "cancelled", "cancelled"
        else:
            record.status, record.error = "failed", as_mesh_error(exc).code
        duration_s = record.ended_at - record.started_at
        _count(record, duration_s)
        gen_ai.describe(record)
        _log.info(
            "request",
            extra={
                "request_id": record.request_id,
                "endpoint": record.endpoint,
                "model": record.model,
                "status": record.status,
                "error": record.error,
                "prompt_tokens": record.usage.prompt_tokens,
                "completion_tokens": record.usage.completion_tokens,
                "duration_ms": round(duration_s * 1e3, 1),
            },
        )

    def model_of(self, request_id: RequestId) -> str:
        """The model that a request was found to mean; empty where that is not known."""
        record = self._records.get(request_id)
        return "" if record is None else record.model

    def find(self, request_id: str) -> dict[str, Any] | None:
        """A request as JSON, None where it is not known any more."""
        record = self._records.get(RequestId(request_id))
        return None if record is None else record.as_json(self._clock())


def _count(record: RequestRecord, duration_s: float) -> None:
    model, usage = metrics.model_label(record.model), record.usage
    metrics.REQUEST_LATENCY.labels(record.endpoint, model).observe(duration_s)
    metrics.PROMPT_TOKENS.labels(model).inc(usage.prompt_tokens)
    metrics.COMPLETION_TOKENS.labels(model).inc(usage.completion_tokens)
    if record.status == "ok":
        metrics.REQUEST_PROMPT_TOKENS.labels(model).observe(usage.prompt_tokens)
        if record.num_choices:  # an embedding has none
            metrics.REQUEST_GENERATION_TOKENS.labels(model).observe(usage.completion_tokens)
