"""How much of a tenant's quota is left, and how much of it a gateway gets. Pure: no clock, no SQL.

A tenant's quota at any time is *settled* (spent for sure, in a window) plus *open* (granted to
gateways, neither spent nor returned yet). Grants keep settled + open within every limit, so that
nothing can be admitted beyond it, whatever gateways do with what they hold. Spending is settled
when it is reported, thus never earlier than it happened: it leaves the window too late, not too
early. Except: what a request holds when its lease ends in an outage is settled at that end, though
the request may run on.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field

from infermesh.quota import Amounts, Limits

WINDOW_S = 60
# A wish beyond what requests need gets at most this part of what is left: others want some, too.
_WISH_PART = 4
_UNLIMITED = 1 << 60
# When quota is held by running requests, they may end at any time.
_HELD_RETRY_S = 1.0


@dataclass(slots=True)
class Tally:
    """What is settled. A cell is one second of the sliding minute."""

    cells: dict[int, tuple[int, int]] = field(default_factory=dict)  # second -> requests, tokens
    day: str = ""
    day_tokens: int = 0
    month: str = ""
    month_tokens: int = 0
    updated_at: float = 0.0

    def set_back(self, now: float) -> float:
        """How far the clock had been ahead, where it was put right; 0 where it never was.

        What is settled then counts as of now: it stays in the window for a whole minute more. A day
        or month that was begun too early keeps its count under the name of the earlier one.
        """
        ahead_s = self.updated_at - now
        if ahead_s <= WINDOW_S:  # clocks of several instances differ a little
            return 0.0
        spent = self.minute
        self.cells = {int(now): (spent.requests, spent.tokens)} if self.cells else {}
        self.day, self.month = calendar(now)
        self.updated_at = now
        return ahead_s

    def advance(self, now: float) -> float:
        """Forgets what has left its window; the time, which does not go back by itself."""
        now = self.updated_at = max(now, self.updated_at)
        oldest = int(now) - WINDOW_S
        self.cells = {second: spent for second, spent in self.cells.items() if second >= oldest}
        day, month = calendar(now)
        if day != self.day:
            self.day, self.day_tokens = day, 0
        if month != self.month:
            self.month, self.month_tokens = month, 0
        return now

    def settle(self, spent: Amounts, at: float) -> None:
        """Adds spending; call `advance` first."""
        if not spent.requests and not spent.tokens:
            return
        second = int(at)
        requests, tokens = self.cells.get(second, (0, 0))
        self.cells[second] = (requests + spent.requests, tokens + spent.tokens)
        self.day_tokens += spent.tokens
        self.month_tokens += spent.tokens

    @property
    def minute(self) -> Amounts:
        """Spent in the sliding minute."""
        return Amounts(
            sum(requests for requests, _ in self.cells.values()),
            sum(tokens for _, tokens in self.cells.values()),
        )


def calendar(now: float) -> tuple[str, str]:
    """Day and month of UTC."""
    moment = datetime.datetime.fromtimestamp(now, datetime.UTC)
    return moment.strftime("%Y-%m-%d"), moment.strftime("%Y-%m")


def room(limits: Limits, tally: Tally, open_amounts: Amounts) -> Amounts:
    """What can still be granted, nothing below zero."""
    minute = tally.minute
    tokens = min(
        _left(limits.tokens_per_minute, minute.tokens),
        _left(limits.daily_tokens, tally.day_tokens),
        _left(limits.monthly_tokens, tally.month_tokens),
    )
    left = Amounts(
        _left(limits.requests_per_minute, minute.requests),
        tokens,
        _left(limits.max_concurrency, 0),
    )
    return (left - open_amounts).at_least(Amounts())


def grant(left: Amounts, needed: Amounts, wanted: Amounts) -> Amounts:
    """What a gateway gets on top: its need as far as there is room, its wish in moderation."""
    need = needed.at_most(left)
    rest = left - need
    share = Amounts(
        rest.requests // _WISH_PART, rest.tokens // _WISH_PART, rest.slots // _WISH_PART
    )
    return need + wanted.at_most(share)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a need could not be met.

    Attributes:
        limit: the name of the limit, as in `Limits`.
        retry_after_s: None where waiting can't help, because the limit itself is too small.
    """

    limit: str
    allowed: int
    retry_after_s: float | None


def refusal(
    limits: Limits, tally: Tally, open_amounts: Amounts, missing: Amounts, now: float
) -> Refusal | None:
    """The limit that stands in the way of `missing` for longest; None where nothing does."""
    minute, held = tally.minute, open_amounts
    requests, tokens = (held.requests, missing.requests), (held.tokens, missing.tokens)
    checks = (
        ("max_concurrency", limits.max_concurrency, 0, (held.slots, missing.slots)),
        ("requests_per_minute", limits.requests_per_minute, minute.requests, requests),
        ("tokens_per_minute", limits.tokens_per_minute, minute.tokens, tokens),
        ("daily_tokens", limits.daily_tokens, tally.day_tokens, tokens),
        ("monthly_tokens", limits.monthly_tokens, tally.month_tokens, tokens),
    )
    found: Refusal | None = None
    for name, limit, settled, (taken, more) in checks:
        if limit is None or not more or settled + taken + more <= limit:
            continue
        wait_s = None if more > limit else _wait_s(name, tally, settled + more - limit, now)
        if found is None or _longer(wait_s, found.retry_after_s):
            found = Refusal(name, limit, wait_s)
    return found


def resets(tally: Tally, now: float) -> float:
    """Seconds until the sliding minute is empty again, where nothing else is spent."""
    return max((second + 1 + WINDOW_S - now for second in tally.cells), default=0.0)


def _left(limit: int | None, spent: int) -> int:
    return _UNLIMITED if limit is None else limit - spent


def _longer(wait_s: float | None, than_s: float | None) -> bool:
    return than_s is not None and (wait_s is None or wait_s > than_s)


def _wait_s(name: str, tally: Tally, excess: int, now: float) -> float:
    """Until `excess` of what is settled has left the window of a limit."""
    if excess <= 0 or name == "max_concurrency":
        return _HELD_RETRY_S  # enough, but for what running requests hold
    moment = datetime.datetime.fromtimestamp(now, datetime.UTC)
    midnight = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    if name == "daily_tokens":
        return (midnight + datetime.timedelta(days=1) - moment).total_seconds()
    if name == "monthly_tokens":
        following = (midnight.replace(day=1) + datetime.timedelta(days=32)).replace(day=1)
        return (following - moment).total_seconds()
    index = 0 if name == "requests_per_minute" else 1
    for second, spent in sorted(tally.cells.items()):
        excess -= spent[index]
        if excess <= 0:
            return second + 1 + WINDOW_S - now
    return _HELD_RETRY_S


def cells_to_json(cells: Mapping[int, tuple[int, int]]) -> list[list[int]]:
    """For a column."""
    return [[second, *spent] for second, spent in sorted(cells.items())]


def cells_from_json(rows: list[list[int]]) -> dict[int, tuple[int, int]]:
    """The inverse of `cells_to_json`."""
    return {second: (requests, tokens) for second, requests, tokens in rows}
