"""Bookings: everybody refused gets a time of its own, room is kept for it, nothing grows."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.scheduler.bookings import GRACE_S, MAX_RETRY_S, Bookings


def book(
    bookings: Bookings,
    key: int,
    *,
    tenant: str = "tenant",
    excess: int = 20,
    rate: float | None = 10.0,
    now_s: float = 0.0,
) -> float:
    return bookings.book(tenant, key, 10, excess, rate, now_s)


def test_each_refused_client_is_told_its_own_time() -> None:
    bookings = Bookings()
    assert [book(bookings, key) for key in range(3)] == pytest.approx([2.0, 3.1, 4.2])
    assert book(bookings, 9, tenant="another") == pytest.approx(2.0)


def test_same_time_is_told_again_when_a_client_comes_too_early() -> None:
    bookings = Bookings()
    book(bookings, 1)
    waits = [book(bookings, 2, now_s=now_s) for now_s in (0.0, 1.0, 2.5)]
    assert waits == pytest.approx([3.1, 2.1, 0.6])
    assert book(bookings, 3) == pytest.approx(4.2)


def test_room_is_kept_from_others_while_one_is_due() -> None:
    bookings = Bookings()
    book(bookings, 1)
    assert bookings.reserved("tenant", 99, 1.9) == 0
    assert bookings.reserved("tenant", 99, 2.0) == 10
    assert bookings.reserved("tenant", 1, 2.0) == 0, "it stands in its own way"
    assert bookings.reserved("another", 99, 2.0) == 0
    assert bookings.reserved("tenant", 99, 2.0 + GRACE_S) == 10
    assert bookings.reserved("tenant", 99, 2.1 + GRACE_S) == 0, "it has not come"


def test_room_is_kept_for_those_whose_turn_comes_before_there_is_more_of_it() -> None:
    bookings = Bookings()
    for key in range(3):  # due at 2, 3.1 and 4.2 s
        book(bookings, key)
    assert bookings.reserved("tenant", 99, 1.0, ahead_s=0.5) == 0
    assert bookings.reserved("tenant", 99, 1.0, ahead_s=2.2) == 20
    assert bookings.reserved("tenant", 1, 1.0, ahead_s=2.2) == 10, "those behind it don't count"
    assert bookings.reserved("tenant", 99, 2.0, ahead_s=1.2) == 20


def test_room_is_given_up_when_the_client_was_let_in() -> None:
    bookings = Bookings()
    book(bookings, 1)
    assert bookings.reserved("tenant", 99, 2.0) == 10
    bookings.claim("tenant", 1)
    assert bookings.reserved("tenant", 99, 2.0) == 0


def test_client_keeps_its_place_when_there_was_no_room_in_time() -> None:
    bookings = Bookings()
    book(bookings, 1)
    book(bookings, 2)
    assert bookings.reserved("tenant", 1, 2.0) == 0
    assert book(bookings, 1, excess=5, now_s=2.0) == pytest.approx(0.5)
    assert bookings.reserved("tenant", 99, 2.5) == 10


def test_nothing_is_booked_when_it_would_be_too_long_or_no_rate_is_known() -> None:
    bookings = Bookings()
    assert book(bookings, 1, rate=None) == 1.0
    assert book(bookings, 2, excess=10_000) == MAX_RETRY_S
    assert len(bookings) == 0


class BookingsMachine(RuleBasedStateMachine):
    """Clients that come early, in time, late or never; tenants that come and go."""

    @initialize()
    def start(self) -> None:
        self.bookings = Bookings()
        self.now_s = 0.0
        # When each client that still means to come was told to.
        self.told: dict[tuple[str, int], float] = {}
        self.num_clients = 0

    @rule(tenant=st.integers(0, 200), excess=st.integers(1, 300), rate=st.integers(1, 100))
    def refuse(self, tenant: int, excess: int, rate: int) -> None:
        self.num_clients += 1
        name = f"tenant-{tenant}"
        wait_s = book(
            self.bookings,
            self.num_clients,
            tenant=name,
            excess=excess,
            rate=float(rate),
            now_s=self.now_s,
        )
        assert 0.099 < wait_s <= MAX_RETRY_S
        if wait_s < MAX_RETRY_S:
            earlier = [due for (other, _), due in self.told.items() if other == name]
            assert all(self.now_s + wait_s >= due for due in earlier), "it got before others"
            self.told[name, self.num_clients] = self.now_s + wait_s

    @rule(seconds=st.floats(0.01, 20.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.told = {
            client: due for client, due in self.told.items() if due + GRACE_S > self.now_s + 0.001
        }

    @precondition(lambda self: self.told)
    @rule(data=st.data())
    def come_in_time(self, data: st.DataObject) -> None:
        tenant, key = client = data.draw(st.sampled_from(sorted(self.told)))
        self.now_s = max(self.now_s, self.told[client])
        assert self.bookings.reserved(tenant, key, self.now_s) == 0
        assert self.bookings.reserved(tenant, -1, self.now_s) >= 10, "its room was given away"
        self.bookings.claim(tenant, key)
        self.told = {c: due for c, due in self.told.items() if due + GRACE_S > self.now_s + 0.001}
        self.told.pop(client, None)

    @invariant()
    def nothing_is_kept_for_nobody(self) -> None:
        for tenant in {tenant for tenant, _ in self.told}:
            self.bookings.reserved(tenant, -1, self.now_s)
        assert len(self.bookings) <= self.num_clients

    def teardown(self) -> None:
        if hasattr(self, "bookings"):
            for tenant in range(201):
                assert self.bookings.reserved(f"tenant-{tenant}", -1, self.now_s + 1000) == 0
            assert len(self.bookings) == 0
            assert not self.bookings, "a line is kept for nobody"


BookingsMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestBookings = BookingsMachine.TestCase


def test_bookings_are_bounded_when_a_flood_never_comes_back() -> None:
    bookings = Bookings()
    for number in range(30_000):
        book(bookings, number, tenant=f"tenant-{number % 5000}", now_s=number / 1000)
    assert len(bookings) <= 1024 * 61, "more lines than the bound, each of a minute"
    for number in range(10_000):
        book(bookings, number, rate=1e6, now_s=40.0)
    assert bookings.reserved("tenant", -1, 40.0) <= 2048 * 10
