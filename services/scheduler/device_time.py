"""What is counted of the shard's time: in steps, between them, and against what was planned."""

from __future__ import annotations

from infermesh.telemetry import metrics
from services.scheduler.ledger import AppliedStep

_RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


class DeviceTime:
    """The metrics; one per process."""

    def __init__(self) -> None:
        counter, histogram = metrics.counter, metrics.histogram
        self._busy = counter("shard_busy_seconds_total", "Time that the shard spent in steps.")
        self._bubble = counter(
            "shard_bubble_seconds_total",
            "Time that the shard had no step although requests were open.",
        )
        self._expected = counter(
            "step_expected_seconds_total", "Device time that steps were planned to take."
        )
        self._took = counter(
            "step_device_seconds_total",
            "Device time that the steps took for which a time was planned.",
        )
        self._error = histogram(
            "step_expectation_error_ratio", "How far off the planned times were.", buckets=_RATIOS
        )
        self._late = counter(
            "steps_over_target_total", "Steps planned to keep a target that took longer."
        )

    def spent(self, busy_s: float, bubble_s: float) -> None:
        """What a step's result says of the shard's time."""
        self._busy.inc(busy_s)
        self._bubble.inc(bubble_s)

    def paced(self, step: AppliedStep, device_s: float, target_s: float) -> None:
        """A step has run that was planned to keep a target, where it had decodes."""
        if step.expected_s:
            self._expected.inc(step.expected_s)
            self._took.inc(device_s)
            self._error.observe(abs(device_s / step.expected_s - 1))
            self._late.inc(device_s > target_s)
