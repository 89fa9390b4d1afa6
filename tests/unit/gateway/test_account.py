"""How much of a lease a gateway keeps for what comes next."""

from gateway.auth.account import Account, Grant
from infermesh.quota import NOTHING, Amounts


def test_client_that_sends_one_after_the_other_keeps_one_slot() -> None:
    account = Account("l", "acme")
    account.apply(Grant("l", Amounts(slots=50), 20.0, False, None, NOTHING, 0.0, 0.0), 0.0)
    cost = Amounts(slots=1)
    for _ in range(50):
        assert account.reserve(cost, 1.0)
        account.settle(cost, 0)
    assert account.report([], 1.0).returned == Amounts(slots=49)


def test_several_times_the_recent_tokens_are_kept_in_hand() -> None:
    account = Account("l", "acme")
    account.apply(Grant("l", Amounts(tokens=1000), 20.0, False, None, NOTHING, 0.0, 0.0), 0.0)
    cost = Amounts(tokens=10)
    assert account.reserve(cost, 1.0)
    account.settle(cost, 10)
    account.report([], 1.0)
    assert account.available(1.0).tokens >= 50
