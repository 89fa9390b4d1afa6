"""What is admitted without leases: within one minute's limits of its own, and told afterwards."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.auth.account import Grant, State, cost_of
from gateway.auth.debt import Debt
from gateway.auth.fail_open import CLOSED, OPEN_AFTER_S, FailOpen, FailPolicy
from gateway.auth.instances import Picker
from gateway.auth.open_account import OpenAccount, may_open
from infermesh.errors import RateLimitExceeded
from infermesh.quota import NOTHING, Amounts, Limits

LIMITS = Limits(requests_per_minute=6, tokens_per_minute=100, max_concurrency=3)
SHARE = 0.5
ANSWER = Grant("l", NOTHING, 20.0, False, None, NOTHING, 0.0, 0.0)
ENDED = Grant("l", NOTHING, 0.0, True, None, NOTHING, 0.0, 0.0)


class OneGateway(RuleBasedStateMachine):
    """Of half the limits: 3 requests and 50 tokens in any 60 seconds, 1 at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.account = OpenAccount("acme")
        self.running: list[tuple[Amounts, int]] = []
        # (when, tokens) of what ended; when each was admitted
        self.used: list[tuple[float, int]] = []
        self.begun: list[float] = []

    @rule(most=st.integers(1, 60))
    def begin(self, most: int) -> None:
        cost = cost_of(LIMITS, most)
        try:
            self.account.reserve(LIMITS, SHARE, cost, self.now)
        except RateLimitExceeded:
            return
        self.running.append((cost, most))
        self.begun.append(self.now)

    @rule(part=st.floats(0, 1))
    def end(self, part: float) -> None:
        if self.running:
            cost, most = self.running.pop()
            used = int(part * most)
            self.account.settle(cost, used, self.now)
            self.used.append((self.now, used))

    @rule(seconds=st.sampled_from([0.5, 20.0, 59.5, 61.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def is_within_its_share(self) -> None:
        recent = [used for at, used in self.used if at > self.now - 60]
        assert sum(recent) + sum(most for _, most in self.running) <= 50
        assert sum(at > self.now - 60 for at in self.begun) <= 3
        assert len(self.running) <= 1

    @invariant()
    def owes_what_was_used(self) -> None:
        used = sum(used for _, used in self.used)
        assert self.account.owed == Amounts(len(self.begun), used)


TestOneGateway = OneGateway.TestCase
TestOneGateway.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_account_is_busy_until_a_minute_after_its_last_request() -> None:
    account = OpenAccount("acme")
    cost = cost_of(LIMITS, 40)
    account.reserve(LIMITS, 1.0, cost, 0.0)
    account.settle(cost, 40, 10.0)
    with pytest.raises(RateLimitExceeded) as caught:
        account.reserve(LIMITS, 1.0, cost_of(LIMITS, 70), 20.0)
    assert caught.value.retry_after_s == 40.0
    assert account.take_owed() == Amounts(1, 40)
    assert not account.is_idle(69.0)
    assert account.left(LIMITS, 1.0, 70.0).tokens == 100
    assert account.is_idle(70.0)


@pytest.mark.parametrize("budget", ["daily_tokens", "monthly_tokens"])
def test_budget_is_never_open(budget: str) -> None:
    assert may_open(LIMITS)
    assert not may_open(Limits(tokens_per_minute=100, **{budget: 10**9}))


def test_open_begins_a_second_after_the_last_answer_and_ends_in_time() -> None:
    outage = FailOpen(FailPolicy(is_open=True, max_s=30.0))
    assert not outage.is_open(0.0)
    outage.asked(100.0)
    outage.asked(100.5)
    assert not outage.is_open(100.0 + OPEN_AFTER_S / 2)
    assert outage.admits(LIMITS, 100.0 + OPEN_AFTER_S)
    assert not outage.admits(Limits(daily_tokens=5), 110.0)
    assert not outage.is_open(130.0)
    outage.answered()
    assert not outage.is_open(110.0)


def test_closed_policy_admits_nothing() -> None:
    outage = FailOpen(CLOSED)
    outage.asked(100.0)
    assert not outage.is_open(110.0)


def test_what_is_owed_is_told_once_and_running_requests_later() -> None:
    outage = FailOpen(FailPolicy(is_open=True))
    outage.asked(0.0)
    cost = cost_of(LIMITS, 30)
    accounts = [outage.reserve("acme", LIMITS, cost, 2.0) for _ in range(2)]
    accounts[0].settle(cost, 20, 3.0)
    (debt,) = outage.debts(4.0)
    assert (debt.tenant, debt.amounts) == ("acme", Amounts(2, 20))
    assert outage.debts(5.0) == [debt], "until it is settled"
    assert told(debt, [ANSWER, ANSWER, ENDED]) == [NOTHING, Amounts(2, 20), Amounts(2, 20)]
    accounts[1].settle(cost, 30, 6.0)
    (later,) = outage.debts(7.0)
    assert later.amounts == Amounts(0, 30)


def told(debt: Debt, answers: list[Grant]) -> list[Amounts]:
    """What was reported spent, answer by answer, until it is settled; the last one closes."""
    states: list[State] = []
    for answer in answers:
        states.append(debt.state())
        debt.answered(answer)
    assert debt.is_settled
    assert [state.closing for state in states] == [False] * (len(states) - 1) + [True]
    return [state.spent for state in states]


def test_debt_whose_lease_ran_out_is_told_by_another() -> None:
    debt = Debt("acme", Amounts(1, 20))
    debt.answered(ANSWER)
    first = debt.state().lease_id
    debt.answered(ENDED)
    assert not debt.is_settled
    again = debt.state()
    assert (again.spent, again.lease_id != first) == (NOTHING, True)


def test_debt_of_a_tenant_that_is_unknown_is_dropped() -> None:
    debt = Debt("gone", Amounts(1, 20))
    debt.answered(ENDED)
    assert debt.is_settled


def test_next_instance_is_asked_once_for_each_failure_of_the_one_in_use() -> None:
    stubs: list[object] = ["a", "b"]
    picker = Picker(stubs)  # type: ignore[arg-type]  # anything that is told apart
    first = picker.stub
    picker.failed(first)
    second = picker.stub
    assert second is not first
    picker.failed(first)
    assert picker.stub is second, "it was given up before"
    stubs[:] = ["c"]
    assert picker.stub == "c"
