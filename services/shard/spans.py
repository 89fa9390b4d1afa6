"""Trace spans of what a sequence did on this device: its prefill, then its decode.

A prefill is recorded when its first token is sampled; a decode when the slot is given up, which the
scheduler says with its next step, so its end is the time of its last row. Sequences without a
trace context cost one look-up per step in which they start.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from infermesh.telemetry import tracing
from services.shard.domain import Slot, Step


@dataclass(slots=True)
class _Stay:
    traceparent: str
    start_ns: int
    last_ns: int
    num_steps: int = 0
    num_tokens: int = 0
    decodes: bool = False


class SequenceSpans:
    """The traced sequences in slots; lives in the worker thread."""

    def __init__(self, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._now_ns = now_ns
        self._stays: dict[Slot, _Stay] = {}

    def begin(self, step: Step) -> None:
        """Before the step runs: slots are given up and filled."""
        for slot in step.finished:
            self._end(slot)
        for new in step.new_sequences:
            if new.traceparent:
                now_ns = self._now_ns()
                self._stays[new.slot] = _Stay(new.traceparent, now_ns, now_ns)

    def ran(self, step: Step) -> None:
        """After the step has run."""
        if not self._stays:
            return
        now_ns = self._now_ns()
        for row in step.rows:
            stay = self._stays.get(row.slot)
            if stay is None:
                continue
            stay.num_steps += 1
            stay.num_tokens += row.num_tokens
            stay.last_ns = now_ns
            if row.sample and not stay.decodes:
                _record("shard.prefill", stay)
                self._stays[row.slot] = _Stay(stay.traceparent, now_ns, now_ns, decodes=True)

    def reset(self) -> None:
        """An epoch is over: so is every stay."""
        for slot in list(self._stays):
            self._end(slot)

    def _end(self, slot: Slot) -> None:
        stay = self._stays.pop(slot, None)
        if stay is not None and stay.num_steps:
            _record("shard.decode" if stay.decodes else "shard.prefill", stay)


def _record(name: str, stay: _Stay) -> None:
    facts = {"infermesh.steps": stay.num_steps, "infermesh.query_tokens": stay.num_tokens}
    tracing.record_span(name, stay.start_ns, stay.last_ns, stay.traceparent, facts)
