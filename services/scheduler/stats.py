"""What an operator sees of this replica: Prometheus metrics, and one trace span per phase.

Counts what it is told; has no opinion about it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from infermesh.telemetry import metrics, tracing
from services.scheduler.device_time import DeviceTime
from services.scheduler.ledger import AppliedStep, Ledger
from services.scheduler.queue import WaitingQueue
from services.scheduler.request_times import RequestTimes
from services.scheduler.sequence import Ending, MoveReason, Sequence, Timeline
from services.scheduler.served import Served
from services.scheduler.step_plan import Start

_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512)
_TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_FAST = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1)


class Stats:
    """The replica's metrics; one per process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        # Spans want wall-clock time, everything else a clock that never jumps.
        self._epoch_ns = time.time_ns() - int(clock() * 1e9)
        self.device_time = DeviceTime()
        self.request_times = RequestTimes()
        self.served = Served()
        counter, gauge = metrics.counter, metrics.gauge
        self._running = gauge("num_requests_running", "Sequences that have a place.")
        self._waiting = gauge("num_requests_waiting", "Sequences that wait for a place.")
        self._queued = gauge("num_tokens_queued", "Tokens to compute of those that wait.")
        self._usage = gauge("kv_cache_usage_ratio", "Held or cached KV blocks over all.")
        self._blocks_used = gauge("num_blocks_used", "KV blocks held by sequences.")
        self._blocks_cached = gauge("num_blocks_cached", "KV blocks kept for reuse.")
        self._blocks_free = gauge("num_blocks_free", "KV blocks without contents.")
        self._queries = counter("prefix_cache_queries_total", "Tokens looked up at admission.")
        self._hits = counter("prefix_cache_hits_total", "Tokens found computed at admission.")
        self._partial_hits = counter(
            "prefix_cache_partial_hits_total", "Of those hits, tokens found in a part of a block."
        )
        self._copies = counter("kv_block_copies_total", "KV blocks copied to be written on.")
        self._evictions = counter(
            "prefix_cache_evictions_total", "Kept KV blocks that were given up for others."
        )
        self._prompt = counter("prompt_tokens_total", "Prompt tokens of accepted requests.")
        self._computed = counter(
            "prompt_tokens_computed_total", "Known tokens that were computed, not found."
        )
        self._generated = counter("generation_tokens_total", "Tokens sampled and kept.")
        self._preemptions = counter("preemptions_total", "Places taken from running sequences.")
        self._blocked = counter(
            "admission_blocked_steps_total",
            "Steps while the next waiting sequence had no place, by what it lacked: slots, "
            "kv_blocks, or tokens: the step itself was full.",
            ("by",),
        )
        self._overtakes = counter(
            "fair_order_overtakes_total", "Admissions before an earlier request of another tenant."
        )
        self._gap = gauge(
            "tenant_service_gap_tokens",
            "Weighted tokens between the most and the least served tenant that wait in one class.",
        )
        self._tenants = gauge("tenants_remembered", "Tenants with a counter, once per class.")
        self._replays = counter("replays_total", "Sequences restarted after a break or failure.")
        self._steps = counter("steps_total", "Steps executed.")
        self._epochs = counter("epochs_total", "Epochs of the step stream opened.")
        self._stalls = counter("shard_stalls_total", "Epochs ended because the shard was silent.")
        self._finished = counter(
            "requests_finished_total", "Choices ended, by why: stop, length, ...", ("reason",)
        )
        self._moved = counter("requests_moved_total", "Requests offered elsewhere.", ("reason",))
        self._orphaned = gauge("orphaned_requests", "Requests that run on without a gateway.")
        self._attaches = counter(
            "attaches_total", "Attaches, and submits of a key that is here.", ("outcome",)
        )
        self._refused = counter("requests_refused_total", "Submits refused, by error.", ("reason",))
        self._budget = gauge("step_budget_tokens", "Query tokens that the last step could hold.")
        self._make_histograms()

    def _make_histograms(self) -> None:
        histogram = metrics.histogram
        self._rows = histogram("step_batch_size", "Rows per step.", buckets=_SIZES)
        self._tokens = histogram("step_tokens", "Query tokens per step.", buckets=_TOKENS)
        self._plan = histogram("scheduler_plan_seconds", "Planning one step.", buckets=_FAST)
        self._step = histogram("step_seconds", "From a step's planning to its result.")

    def accepted(self, num_prompt_tokens: int) -> None:
        self._prompt.inc(num_prompt_tokens)

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def moved(self, reason: MoveReason) -> None:
        self._moved.labels(reason.name.lower()).inc()

    def orphaned(self, count: int) -> None:
        self._orphaned.set(count)

    def attached(self, outcome: str) -> None:
        self._attaches.labels(outcome).inc()

    def planned(self, seconds: float) -> None:
        self._plan.observe(seconds)

    def admitted(self, sequence: Sequence, start: Start, block_size: int) -> None:
        self._queries.inc(len(sequence.token_ids))
        self._hits.inc(start.num_computed)
        self._partial_hits.inc(start.num_from_part(block_size))

    def overtook(self) -> None:
        self._overtakes.inc()

    def preempted(self) -> None:
        self._preemptions.inc()

    def replayed(self, count: int) -> None:
        self._replays.inc(count)

    def epoch_opened(self) -> None:
        self._epochs.inc()

    def stalled(self) -> None:
        self._stalls.inc()

    def executed(self, step: AppliedStep, num_generated: int, seconds: float) -> None:
        self._steps.inc()
        self._rows.observe(len(step.rows))
        self._tokens.observe(step.num_tokens)
        self._budget.set(step.budget)
        if step.shortage is not None:
            self._blocked.labels(step.shortage.value).inc()
        self._step.observe(seconds)
        self._copies.inc(len(step.copies))
        self._evictions.inc(step.num_evicted)
        self._computed.inc(step.num_known)
        self._generated.inc(num_generated)

    def first_token(self, timeline: Timeline) -> None:
        self.request_times.first_token(timeline)

    def occupied(self, ledger: Ledger, queue: WaitingQueue) -> None:
        pool = ledger.pool
        self._running.set(len(ledger.running))
        self._waiting.set(len(queue))
        self._queued.set(queue.num_tokens)
        self._gap.set(queue.service_gap())
        self._tenants.set(queue.num_accounts())
        self._usage.set(1 - pool.num_free / pool.num_blocks)
        self._blocks_used.set(pool.num_used)
        self._blocks_cached.set(pool.num_cached)
        self._blocks_free.set(pool.num_free)

    def ended(self, sequence: Sequence, ending: Ending, now_s: float) -> None:
        """Counts it and records where its time went."""
        self._finished.labels(ending.reason.name.lower()).inc()
        self.request_times.ended(sequence.timeline, sequence.num_output)
        traceparent = sequence.request.traceparent
        if not traceparent:
            return
        line = sequence.timeline
        facts: dict[str, tracing.Value] = {
            "infermesh.request_id": sequence.request.request_id,
            "infermesh.choice": sequence.choice,
            "gen_ai.response.finish_reasons": (ending.reason.name.lower(),),
            "gen_ai.usage.input_tokens": sequence.prompt_len,
            "gen_ai.usage.output_tokens": sequence.num_output,
            "gen_ai.usage.cache_read.input_tokens": sequence.cached_prompt_tokens or 0,
            "infermesh.preemptions": line.num_preemptions,
            "infermesh.replays": line.num_replays,
        }
        marks = [
            ("queue", line.arrived_s, line.first_step_s or now_s),
            ("prefill", line.first_step_s, line.first_token_s or now_s),
            ("decode", line.first_token_s, line.last_token_s),
        ]
        for name, start_s, end_s in marks:
            if start_s is not None and end_s is not None:
                tracing.record_span(name, self._ns(start_s), self._ns(end_s), traceparent, facts)

    def _ns(self, seconds: float) -> int:
        return self._epoch_ns + int(seconds * 1e9)
