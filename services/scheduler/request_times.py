"""Where a replica's requests spend their time: waiting, in their prompt, in their output."""

from __future__ import annotations

from infermesh.telemetry import metrics
from infermesh.telemetry.metrics import GAP_BUCKETS, LATENCY_BUCKETS, WAIT_BUCKETS
from services.scheduler.sequence import Timeline


class RequestTimes:
    """The histograms; one per process."""

    def __init__(self) -> None:
        histogram = metrics.histogram
        self._queue = histogram(
            "request_queue_time_seconds",
            "From a request's arrival to its first step.",
            buckets=WAIT_BUCKETS,
        )
        self._prefill = histogram(
            "request_prefill_time_seconds",
            "From a choice's first step to its first token.",
            buckets=LATENCY_BUCKETS,
        )
        self._decode = histogram(
            "request_decode_time_seconds",
            "From a choice's first token to its last.",
            buckets=LATENCY_BUCKETS,
        )
        self._per_token = histogram(
            "request_time_per_output_token_seconds",
            "Of a choice's decode, per token after the first.",
            buckets=GAP_BUCKETS,
        )
        self._ttft = histogram(
            "replica_time_to_first_token_seconds",
            "From a request's arrival at the replica to its first token.",
            buckets=LATENCY_BUCKETS,
        )

    def first_token(self, line: Timeline) -> None:
        """A choice has its first token."""
        if line.first_token_s is None or line.first_step_s is None:
            return
        self._ttft.observe(line.first_token_s - line.arrived_s)
        self._queue.observe(line.first_step_s - line.arrived_s)
        self._prefill.observe(line.first_token_s - line.first_step_s)

    def ended(self, line: Timeline, num_output: int) -> None:
        """A choice is over, whatever the reason."""
        if line.first_token_s is None or line.last_token_s is None or num_output < 2:
            return
        decode_s = line.last_token_s - line.first_token_s
        self._decode.observe(decode_s)
        self._per_token.observe(decode_s / (num_output - 1))
