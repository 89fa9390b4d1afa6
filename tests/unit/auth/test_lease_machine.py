"""Whatever gateways, the network and time do: no minute and no day has more than is allowed.

The auth service's policy (`quota`) and the gateways' accounts run against each other; reports and
answers get lost, gateways die, leases run out, requests end at any time.
"""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from gateway.auth.account import Account, Grant, cost_of
from infermesh.quota import NOTHING, Amounts, Limits
from services.auth import quota
from services.auth.quota import Tally

LIMITS = Limits(requests_per_minute=7, tokens_per_minute=100, max_concurrency=4, daily_tokens=300)
LEASE_S, MAX_REQUEST_S = 20.0, 30.0
SEEDS_IN_MAKE_TEST = 80
# around the ends of a lease and of a minute
WAITS = st.sampled_from([0.3, 1.0, 8.0, 18.5, 21.5, 52.0, 59.5, 61.0])
MOST = st.sampled_from([10, 25, 50, 50])


@dataclass
class Row:
    """A lease as the auth service keeps it."""

    granted: Amounts = NOTHING
    spent: Amounts = NOTHING
    returned: Amounts = NOTHING
    expires_at: float = 0.0
    is_over: bool = False

    @property
    def open(self) -> Amounts:
        return (self.granted - self.spent - self.returned).at_least(NOTHING)


@dataclass
class Service:
    """What `services.auth.leases` does in SQL, in memory."""

    tally: Tally = field(default_factory=Tally)
    rows: dict[str, Row] = field(default_factory=dict)

    def report(self, account: Account, waiting: list[Amounts], now: float) -> Grant:
        state = account.report(waiting, now, LIMITS)
        now = self.tally.advance(now)
        for row in self.rows.values():
            if row.expires_at <= now and not row.is_over:
                rest = Amounts(row.open.requests, row.open.tokens)
                self.tally.settle(rest, row.expires_at)
                row.spent += rest
                row.is_over = True
        for lease_id, row in list(self.rows.items()):
            if row.is_over and row.expires_at + MAX_REQUEST_S <= now:
                del self.rows[lease_id]
        if state.lease_id not in self.rows and state.spent != NOTHING:
            return Grant(state.lease_id, NOTHING, 0.0, True, None, NOTHING, 0.0, 0.0)
        row = self.rows.setdefault(state.lease_id, Row(expires_at=now + LEASE_S))
        if row.is_over:
            return Grant(state.lease_id, NOTHING, 0.0, True, None, NOTHING, 0.0, 0.0)
        spent = row.spent.at_least(state.spent)
        self.tally.settle(spent - row.spent, now)
        row.spent, row.returned = spent, row.returned.at_least(state.returned)
        left = quota.room(LIMITS, self.tally, self.open())
        row.granted += quota.grant(left, state.needed, state.wanted)
        row.expires_at = now + LEASE_S
        return Grant(state.lease_id, row.granted, LEASE_S, False, None, left, 0.0, 0.0)

    def open(self) -> Amounts:
        return sum((row.open for row in self.rows.values()), NOTHING)


@dataclass(eq=False)
class Request:
    account: Account
    cost: Amounts
    admitted_at: float
    most: int
    ended_at: float | None = None
    used: int = 0

    @property
    def tokens(self) -> int:
        return self.used if self.ended_at is not None else self.most


class Leases(RuleBasedStateMachine):
    """Three gateways of one tenant."""

    running = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_700_006_000.0  # shortly before midnight
        self.service = Service()
        self.count = 0
        self.accounts = [self.new_account() for _ in range(3)]
        self.requests: list[Request] = []

    def new_account(self) -> Account:
        self.count += 1
        return Account(f"lease-{self.count}", "acme")

    def account(self, index: int) -> Account:
        account = self.accounts[index]
        if account.granted != NOTHING and self.now >= account.usable_until:
            account = self.accounts[index] = self.new_account()
        return account

    @rule(
        index=st.integers(0, 2),
        waiting=st.sampled_from([[], [], [], [25]]),
        lost=st.sampled_from(["nothing", "nothing", "the answer", "both"]),
        delay_s=st.floats(0, 3),
    )
    def report(self, index: int, waiting: list[int], lost: str, delay_s: float) -> None:
        account = self.account(index)
        costs = [cost_of(LIMITS, tokens) for tokens in waiting]
        sent_at = self.now
        self.now += delay_s
        if lost == "both":
            account.report(costs, sent_at, LIMITS)
            return
        if lost == "the answer":
            self.service.report(account, costs, self.now)
            return
        self.exchange(index, costs, sent_at)

    def exchange(self, index: int, costs: list[Amounts], sent_at: float | None = None) -> None:
        account = self.account(index)
        grant = self.service.report(account, costs, self.now)
        if grant.ended:
            self.accounts[index] = self.new_account()
        else:
            account.apply(grant, self.now if sent_at is None else sent_at)

    @rule(target=running, index=st.integers(0, 2), most=MOST)
    def begin(self, index: int, most: int) -> Request | None:
        """As a gateway does: from what it has, else by asking for more."""
        cost = cost_of(LIMITS, most)
        if not self.account(index).reserve(cost, self.now):
            self.exchange(index, [cost])
        account = self.account(index)
        if not account.reserve(cost, self.now):
            return None
        request = Request(account, cost, self.now, most)
        self.requests.append(request)
        return request

    @rule(request=consumes(running), share=st.sampled_from([0.0, 0.4, 1.0, 1.0]))
    def end(self, request: Request | None, share: float) -> None:
        if request is None or request.ended_at is not None:
            return
        request.ended_at = self.now
        request.used = round(request.most * share)
        request.account.settle(request.cost, request.used)

    @rule(index=st.integers(0, 2))
    def kill(self, index: int) -> None:
        """Its requests end with it; nobody settles them."""
        for request in self.requests:
            if request.account is self.accounts[index] and request.ended_at is None:
                request.ended_at, request.used = self.now, request.most
        self.accounts[index] = self.new_account()

    @rule(seconds=WAITS)
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for request in self.requests:
            if request.ended_at is None and request.admitted_at + MAX_REQUEST_S <= self.now:
                request.ended_at = request.admitted_at + MAX_REQUEST_S
                request.used = request.most
                request.account.settle(request.cost, request.used)

    @rule(index=st.integers(0, 2))
    def tick(self, index: int) -> None:
        self.accounts[index].tick()

    @invariant()
    def minute_is_within_the_limit_by_admission(self) -> None:
        self.check_minute([r for r in self.requests if r.admitted_at > self.now - 60])

    @invariant()
    def minute_is_within_the_limit_by_end(self) -> None:
        """Of requests that ended, or run, within their lease."""
        ends = [(request, request.ended_at or self.now) for request in self.requests]
        self.check_minute([r for r, at in ends if self.now - 60 < at < r.account.usable_until])

    def check_minute(self, recent: list[Request]) -> None:
        assert LIMITS.tokens_per_minute is not None
        assert sum(request.tokens for request in recent) <= LIMITS.tokens_per_minute

    @invariant()
    def requests_of_a_minute_are_within_the_limit(self) -> None:
        assert LIMITS.requests_per_minute is not None
        recent = [r for r in self.requests if r.admitted_at > self.now - 60]
        assert len(recent) <= LIMITS.requests_per_minute

    @invariant()
    def requests_at_once_are_within_the_limit(self) -> None:
        assert LIMITS.max_concurrency is not None
        assert sum(r.ended_at is None for r in self.requests) <= LIMITS.max_concurrency

    @invariant()
    def day_is_within_the_limit(self) -> None:
        assert LIMITS.daily_tokens is not None
        today, _ = quota.calendar(self.now)
        ended = [r for r in self.requests if quota.calendar(r.admitted_at)[0] == today]
        assert sum(r.tokens for r in ended) <= LIMITS.daily_tokens

    @invariant()
    def accounts_never_have_less_than_nothing(self) -> None:
        for account in self.accounts:
            if self.now < account.usable_until:
                left = account.granted - account.spent - account.returned - account.held
                assert left.covers(NOTHING)


def act(machine: Leases, dice: random.Random) -> None:
    """One step of a busy tenant."""
    index = dice.randrange(3)
    open_requests = [request for request in machine.requests if request.ended_at is None]
    match dice.choices(range(6), weights=(6, 4, 4, 3, 1, 0.2))[0]:
        case 0:
            machine.begin(index, dice.choice((5, 10, 25, 50)))
        case 1 if open_requests:
            machine.end(dice.choice(open_requests), dice.choice((0.0, 0.4, 1.0, 1.0)))
        case 2:
            lost = dice.choice(("nothing", "nothing", "the answer", "both"))
            machine.report(index, [], lost, dice.choice((0.0, 0.5, 3.0)))
        case 3:
            machine.wait(dice.choice((0.3, 1.0, 8.0, 18.5, 21.5, 30.0, 52.0, 59.5)))
        case 4:
            machine.tick(index)
        case 5:
            machine.kill(index)


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=[pytest.mark.slow] if seed >= SEEDS_IN_MAKE_TEST else [])
        for seed in range(300)
    ],
)
def test_no_limit_is_passed_in_a_long_random_run(seed: int) -> None:
    machine, dice = Leases(), random.Random(seed)
    for _ in range(200):
        act(machine, dice)
        machine.minute_is_within_the_limit_by_admission()
        machine.minute_is_within_the_limit_by_end()
        machine.requests_of_a_minute_are_within_the_limit()
        machine.requests_at_once_are_within_the_limit()
        machine.day_is_within_the_limit()
        machine.accounts_never_have_less_than_nothing()
    assert len(machine.requests) > 10


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
