"""Windows, budgets and the times after which a refused request can succeed."""

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infermesh.quota import NOTHING, Amounts, Limits
from services.auth import quota
from services.auth.quota import Tally

NOON = datetime.datetime(2026, 3, 14, 12, tzinfo=datetime.UTC).timestamp()
LIMITS = Limits(requests_per_minute=10, tokens_per_minute=100, max_concurrency=3)


def tally(*spent: tuple[float, int], now: float = NOON) -> Tally:
    """Tokens that were spent so many seconds ago."""
    made = Tally()
    for ago_s, tokens in spent:
        made.advance(now - ago_s)
        made.settle(Amounts(requests=1, tokens=tokens), now - ago_s)
    made.advance(now)
    return made


def test_minute_slides() -> None:
    made = tally((59.0, 30), (61.5, 40))
    assert made.minute == Amounts(requests=1, tokens=30)
    # a whole second is kept until all of it is a minute old
    made = tally((60.5, 40), now=NOON + 0.6)
    assert made.minute.tokens == 40


def test_time_never_goes_back() -> None:
    made = Tally()
    made.advance(NOON)
    assert made.advance(NOON - 100) == NOON


def test_day_and_month_begin_anew_in_utc() -> None:
    last_second = datetime.datetime(2026, 2, 28, 23, 59, 59, tzinfo=datetime.UTC).timestamp()
    made = Tally()
    made.advance(last_second)
    made.settle(Amounts(tokens=5), last_second)
    assert (made.day_tokens, made.month_tokens) == (5, 5)
    made.advance(last_second + 1)
    assert (made.day, made.day_tokens, made.month, made.month_tokens) == (
        "2026-03-01",
        0,
        "2026-03",
        0,
    )


def test_room_is_the_tightest_of_all_token_limits() -> None:
    made = tally((1.0, 30))
    limits = Limits(tokens_per_minute=100, daily_tokens=90, monthly_tokens=50)
    assert quota.room(limits, made, Amounts(tokens=5)).tokens == 15


def test_room_is_never_negative_when_a_limit_was_lowered() -> None:
    assert quota.room(Limits(tokens_per_minute=10), tally((1.0, 30)), Amounts(tokens=5)).tokens == 0


def test_grant_meets_needs_first_and_wishes_by_a_part_of_the_rest() -> None:
    left = Amounts(requests=10, tokens=100, slots=3)
    got = quota.grant(left, Amounts(1, 60, 1), Amounts(9, 100, 9))
    assert got == Amounts(requests=1 + 2, tokens=60 + 10, slots=1)


@pytest.mark.parametrize(
    ("missing", "open_amounts", "limit", "wait_s"),
    [
        (Amounts(tokens=20), NOTHING, "tokens_per_minute", 31.0),
        (Amounts(tokens=70), NOTHING, "tokens_per_minute", 51.0),
        (Amounts(tokens=20), Amounts(tokens=90), "tokens_per_minute", 31.0),
        (Amounts(tokens=5), Amounts(tokens=10), "tokens_per_minute", 1.0),
        (Amounts(tokens=101), NOTHING, "tokens_per_minute", None),
        (Amounts(slots=1), Amounts(slots=3), "max_concurrency", 1.0),
        (Amounts(slots=4), NOTHING, "max_concurrency", None),
        (Amounts(requests=9), NOTHING, "requests_per_minute", 31.0),
    ],
)
def test_refusal_names_the_limit_and_when_there_is_room(
    missing: Amounts, open_amounts: Amounts, limit: str, wait_s: float | None
) -> None:
    made = tally((30.0, 50), (10.0, 40))
    found = quota.refusal(LIMITS, made, open_amounts, missing, NOON)
    assert found is not None
    assert (found.limit, found.retry_after_s) == (limit, wait_s)


def test_refusal_by_the_day_lasts_until_midnight_and_by_the_month_until_its_end() -> None:
    made = tally((30.0, 50))
    daily = quota.refusal(Limits(daily_tokens=60), made, NOTHING, Amounts(tokens=20), NOON)
    monthly = quota.refusal(Limits(monthly_tokens=60), made, NOTHING, Amounts(tokens=20), NOON)
    assert daily is not None
    assert monthly is not None
    assert daily.retry_after_s == 12 * 3600
    assert monthly.retry_after_s == (17 * 24 + 12) * 3600


def test_nothing_is_refused_where_there_is_room() -> None:
    assert quota.refusal(LIMITS, Tally(), NOTHING, Amounts(1, 100, 1), NOON) is None


def test_cells_survive_their_column() -> None:
    made = tally((30.0, 50), (10.0, 40))
    assert quota.cells_from_json(quota.cells_to_json(made.cells)) == made.cells


@given(
    spent=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 100)), max_size=8),
    ahead_s=st.floats(61, 40 * 86_400),
    later_s=st.floats(0, 59),
)
def test_a_clock_that_was_ahead_and_is_put_right_frees_nothing_early_and_holds_nothing_for_long(
    spent: list[tuple[int, int]], ahead_s: float, later_s: float
) -> None:
    made = Tally()
    made.advance(NOON + ahead_s)
    for second, tokens in spent:
        made.settle(Amounts(1, tokens), NOON + ahead_s - second)
    before = made.minute
    assert made.set_back(NOON) == pytest.approx(ahead_s)
    assert made.advance(NOON + later_s) == NOON + later_s
    assert made.minute == before
    assert made.day_tokens == sum(tokens for _, tokens in spent)
    made.advance(NOON + 62)
    assert made.minute == NOTHING


@given(behind_s=st.floats(0, 60))
def test_clocks_that_differ_a_little_set_nothing_back(behind_s: float) -> None:
    made = tally((30.0, 50))
    made.advance(NOON)
    assert made.set_back(NOON - behind_s) == 0
    assert made.advance(NOON - behind_s) == NOON
