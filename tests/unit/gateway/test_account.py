"""How much of a lease a gateway keeps for what comes next."""

from gateway.auth.account import Account, Grant
from infermesh.quota import NOTHING, Amounts, Limits


def test_client_that_sends_one_after_the_other_keeps_one_slot() -> None:
    account = Account("l", "acme")
    account.apply(Grant("l", Amounts(slots=50), 20.0, False, None, NOTHING, 0.0, 0.0), 0.0)
    cost = Amounts(slots=1)
    for _ in range(50):
        assert account.reserve(cost, 1.0)
        account.settle(cost, 0)
    assert account.report([], 1.0, Limits()).returned == Amounts(slots=49)


def test_several_times_the_recent_tokens_are_kept_in_hand() -> None:
    account = Account("l", "acme")
    account.apply(Grant("l", Amounts(tokens=1000), 20.0, False, None, NOTHING, 0.0, 0.0), 0.0)
    cost = Amounts(tokens=10)
    assert account.reserve(cost, 1.0)
    account.settle(cost, 10)
    account.report([], 1.0, Limits())
    assert account.available(1.0).tokens >= 50


def test_part_of_the_minutes_limits_is_kept_when_traffic_has_just_begun() -> None:
    account = Account("l", "acme")
    cost = Amounts(requests=1, tokens=10)
    limits = Limits(requests_per_minute=160, tokens_per_minute=16_000)
    first = account.report([cost], 1.0, limits)
    assert (first.needed, first.wanted) == (cost, Amounts(requests=10, tokens=1000))
    granted = first.needed + first.wanted
    account.apply(Grant("l", granted, 20.0, False, None, NOTHING, 0.0, 0.0), 0.0)
    assert account.reserve(cost, 1.0)
    account.settle(cost, 10)
    later = account.report([], 1.5, limits)
    assert (later.wanted, later.returned) == (NOTHING, NOTHING)


def test_little_of_a_budget_is_kept_beyond_recent_traffic() -> None:
    cost = Amounts(tokens=10)
    limits = Limits(tokens_per_minute=16_000, daily_tokens=20_480)
    first = Account("l", "acme").report([cost], 1.0, limits)
    assert (first.needed, first.wanted) == (cost, Amounts(tokens=20))


def test_lease_is_low_when_half_of_what_the_last_grant_brought_is_gone() -> None:
    account = Account("l", "acme")
    assert not account.is_low(1.0)  # nothing was granted yet: requests wait and say so
    account.apply(Grant("l", Amounts(tokens=100), 20.0, False, None, NOTHING, 0.0, 0.0), 0.0)
    for is_low in (False, True):
        assert account.reserve(Amounts(tokens=30), 1.0)
        assert account.is_low(1.0) is is_low
    account.apply(Grant("l", Amounts(tokens=100), 20.0, False, None, NOTHING, 0.0, 0.0), 0.0)
    assert not account.is_low(1.0)  # there was no more to be had
