"""When the parts of each request came, and the figures of many requests: arithmetic alone.

TTFT: from when a request was due to its first chunk. ITL: between two chunks of one answer, which
are a token each where every token has text. TPOT: the same per token, over the answer. E2E: from
when it was due to the end.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(slots=True)
class Timeline:
    """One request; seconds on one clock.

    Attributes:
        due_s: when it should have been sent. An open loop that is late does not hide its lateness.
        error: why it was refused or failed, in a word; None: it was answered.
    """

    due_s: float
    chunks_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    output_tokens: int = 0
    prompt_tokens: int = 0
    error: str | None = None
    message: str = ""

    @property
    def ttft_s(self) -> float:
        """To the first chunk; to the end, where the answer had none."""
        return (self.chunks_s[0] if self.chunks_s else self.ended_s) - self.due_s

    @property
    def e2e_s(self) -> float:
        """To the end."""
        return self.ended_s - self.due_s

    @property
    def gaps_s(self) -> list[float]:
        """Between its chunks."""
        pairs = zip(self.chunks_s, self.chunks_s[1:], strict=False)
        return [later - earlier for earlier, later in pairs]

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first; None of a single one."""
        if self.output_tokens < 2 or len(self.chunks_s) < 2:
            return None
        return (self.chunks_s[-1] - self.chunks_s[0]) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Report:
    """One run's figures. Times are of answered requests; None where there is none."""

    requests: int
    errors: dict[str, int]
    output_tokens: int
    wall_s: float
    tokens_per_s: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    itl_p50_ms: float | None
    itl_p99_ms: float | None
    tpot_p50_ms: float | None
    e2e_p50_ms: float | None
    e2e_p99_ms: float | None


def report(done: Sequence[Timeline], wall_s: float) -> Report:
    """Of a run that took `wall_s`."""
    answered = [one for one in done if one.error is None]
    ttft = [one.ttft_s for one in answered]
    itl = [gap for one in answered for gap in one.gaps_s]
    tpot = [one.tpot_s for one in answered if one.tpot_s is not None]
    e2e = [one.e2e_s for one in answered]
    output_tokens = sum(one.output_tokens for one in answered)
    return Report(
        requests=len(answered),
        errors=dict(Counter(one.error for one in done if one.error is not None)),
        output_tokens=output_tokens,
        wall_s=round(wall_s, 3),
        tokens_per_s=round(output_tokens / wall_s, 2),
        ttft_p50_ms=percentile_ms(ttft, 50),
        ttft_p99_ms=percentile_ms(ttft, 99),
        itl_p50_ms=percentile_ms(itl, 50),
        itl_p99_ms=percentile_ms(itl, 99),
        tpot_p50_ms=percentile_ms(tpot, 50),
        e2e_p50_ms=percentile_ms(e2e, 50),
        e2e_p99_ms=percentile_ms(e2e, 99),
    )


def percentile_ms(seconds: Sequence[float], percentile: int) -> float | None:
    """Of times, in milliseconds, between the two nearest; None of none."""
    if len(seconds) < 2:
        return round(1000 * seconds[0], 2) if seconds else None
    return round(1000 * statistics.quantiles(seconds, n=100, method="inclusive")[percentile - 1], 2)


def print_table(rows: Sequence[tuple[str, Report]]) -> None:
    """One row per named report."""
    names = [item.name for item in fields(Report)]
    print(" ".join(f"{name:>13}" for name in ("load", *names)))
    for load, one in rows:
        values: dict[str, Any] = asdict(one) | {"errors": sum(one.errors.values())}
        cells = ("–" if values[name] is None else str(values[name]) for name in names)
        print(" ".join(f"{cell:>13}" for cell in (load, *cells)))
