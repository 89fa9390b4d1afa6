"""How fast this replica works, from what it did lately: the evidence for estimates and refusals.

Told step by step by a caller that has a clock; decides nothing.
"""

from __future__ import annotations

from collections import deque

# Weight of the newest in a running mean.
_NEWEST = 1 / 16
# Departures from the queue that are remembered: a change shows within so many.
_NUM_PAUSES = 16


class Throughput:
    """Tokens over the last seconds, and the time that the device was busy with them."""

    def __init__(self, horizon_s: float = 10.0) -> None:
        self._horizon_s = horizon_s
        self._steps: deque[tuple[float, int, float]] = deque()
        self._tokens = 0
        self._busy_s = 0.0
        self._last_s = 0.0

    def record(self, sent_s: float, done_s: float, num_tokens: int) -> None:
        """One step; the device was busy with it since it was sent or the one before was done."""
        busy_s = max(0.0, done_s - max(sent_s, self._last_s))
        self._last_s = done_s
        self._steps.append((done_s, num_tokens, busy_s))
        self._tokens += num_tokens
        self._busy_s += busy_s
        self._forget(done_s)

    def tokens_per_second(self, now_s: float) -> float:
        """What was computed lately, idle time included; 0 where nothing was."""
        self._forget(now_s)
        if not self._steps:
            return 0.0
        return self._tokens / max(now_s - self._steps[0][0] + self._steps[0][2], 1e-3)

    def drain_rate(self) -> float | None:
        """Tokens per second of busy time; None before the first."""
        return self._tokens / self._busy_s if self._busy_s > 0 and self._tokens else None

    def _forget(self, now_s: float) -> None:
        # The last step stays: a rate from before a pause beats none.
        while len(self._steps) > 1 and self._steps[0][0] < now_s - self._horizon_s:
            _, tokens, busy_s = self._steps.popleft()
            self._tokens -= tokens
            self._busy_s -= busy_s


class Pace:
    """How fast waiting tokens leave the queue, and how long an answer takes once it runs."""

    def __init__(self) -> None:
        # Tokens that got a place, while others had to go on waiting.
        self._left = Throughput()
        # Known tokens of steps that were full of them.
        self._computed = Throughput()
        # How long steps take: a running mean.
        self.step_s: float | None = None
        self._num_output: float | None = None
        self._left_s: float | None = None
        self._pauses_s: deque[float] = deque(maxlen=_NUM_PAUSES)
        # Known tokens that the last step could hold beside its decodes.
        self.known_per_step: int | None = None

    @property
    def pause_s(self) -> float:
        """The longest of the last times between departures from the queue: sequences that began
        together end together."""
        return max(self._pauses_s, default=0.0)

    def left_queue(self, sent_s: float, done_s: float, num_tokens: int) -> None:
        """So many waiting tokens got a place during a step that left others waiting."""
        self._left.record(sent_s, done_s, num_tokens)
        if num_tokens:
            if self._left_s is not None:
                self._pauses_s.append(done_s - self._left_s)
            self._left_s = done_s

    def queue_emptied(self) -> None:
        """Until somebody waits again, no time counts as one without departures."""
        self._left_s = None

    def computed(self, sent_s: float, done_s: float, num_tokens: int) -> None:
        """A step was nearly full of that many known tokens."""
        self._computed.record(sent_s, done_s, num_tokens)

    def step(self, seconds: float) -> None:
        """How long a step took."""
        self.step_s = _mean(self.step_s, seconds)

    def answered(self, num_output: int) -> None:
        """An answer came to its own end after so many tokens."""
        self._num_output = _mean(self._num_output, num_output)

    def drain_rate(self) -> float | None:
        """Waiting tokens per second; None where there is no evidence.

        Places limit it where answers are long, the token budget where prompts are. A step of
        decodes takes almost as long with a prompt in it, so its few prompt tokens are no rate.
        """
        return self._left.drain_rate() or self._computed.drain_rate()

    def seconds_for(self, num_tokens: int) -> float | None:
        """How long that many waiting tokens take; None where the rate is unknown."""
        rate = self.drain_rate()
        return num_tokens / rate if rate else None

    def service_s(self, num_prompt_steps: int, min_tokens: int, max_tokens: int | None) -> float:
        """How long an answer of the usual length takes from its first step on."""
        if self.step_s is None:
            return 0.0
        num_output = self._num_output or 0.0
        if max_tokens is not None:
            num_output = min(num_output, max_tokens)
        # one more: the step that is planned already when it comes
        return self.step_s * (num_prompt_steps + max(1, min_tokens, num_output))


def _mean(mean: float | None, newest: float) -> float:
    return newest if mean is None else mean + _NEWEST * (newest - mean)
