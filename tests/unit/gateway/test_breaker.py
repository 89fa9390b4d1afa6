"""The circuit breaker and the slow start, under any order of events."""

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.breaker import BreakerSettings, Circuit, CircuitBreaker, SlowStart
from gateway.crashes import Crashes

SETTINGS = BreakerSettings(
    max_failures=3, window_s=10.0, cool_down_s=2.0, longest_cool_down_s=16.0, num_probes=2
)
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["fail", "succeed", "choose", "pass"]), st.floats(0.0, 40.0, width=32)
    ),
    max_size=60,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(draw: float = 0.5) -> tuple[CircuitBreaker, Clock]:
    clock = Clock()
    return CircuitBreaker(clock, lambda: draw, SETTINGS), clock


def fail(breaker: CircuitBreaker, times: int = SETTINGS.max_failures) -> None:
    for _ in range(times):
        breaker.failed()


@settings(max_examples=300)
@given(EVENTS, st.floats(0.0, 1.0, exclude_max=True))
def test_circuit_keeps_its_rules_whatever_happens(
    events: list[tuple[str, float]], draw: float
) -> None:
    breaker, clock = make(draw)
    failures: list[float] = []
    for event, seconds in events:
        before = breaker.circuit
        if event == "pass":
            clock.now += seconds
            # time alone opens nothing, and never closes it
            assert breaker.circuit == before or (before, breaker.circuit) == (
                Circuit.OPEN,
                Circuit.HALF_OPEN,
            )
        elif event == "fail":
            breaker.failed()
            if before is not Circuit.OPEN:
                failures.append(clock.now)
            if before is Circuit.CLOSED:
                recent = [at for at in failures if clock.now - at <= SETTINGS.window_s]
                assert breaker.circuit is not Circuit.OPEN or len(recent) >= SETTINGS.max_failures
            else:
                assert breaker.circuit is Circuit.OPEN
        elif event == "succeed":
            assert breaker.succeeded() == (before is Circuit.HALF_OPEN)
            if breaker.circuit is Circuit.CLOSED and before is Circuit.HALF_OPEN:
                failures.clear()
        elif breaker.permits:
            breaker.chosen()
        # a closed circuit lets all through, an open one none, and each ends
        assert breaker.permits or breaker.circuit is not Circuit.CLOSED
        assert not breaker.permits or breaker.circuit is not Circuit.OPEN
        assert 0 <= breaker.retry_after_s <= SETTINGS.longest_cool_down_s
        assert (breaker.retry_after_s > 0) == (breaker.circuit is Circuit.OPEN)
    clock.now += SETTINGS.longest_cool_down_s + SETTINGS.probe_timeout_s
    assert breaker.permits  # nobody is shut out for ever


def test_circuit_opens_when_failures_come_close_together() -> None:
    breaker, clock = make()
    for _ in range(10):  # now and then
        breaker.failed()
        clock.now += SETTINGS.window_s / 2 + 0.1
    assert breaker.circuit is Circuit.CLOSED
    fail(breaker)
    assert breaker.circuit is Circuit.OPEN


def test_few_probes_go_out_when_the_circuit_is_half_open() -> None:
    breaker, clock = make()
    fail(breaker)
    clock.now += breaker.retry_after_s
    assert breaker.circuit is Circuit.HALF_OPEN
    for _ in range(SETTINGS.num_probes):
        assert breaker.permits
        breaker.chosen()
    assert not breaker.permits
    clock.now += SETTINGS.probe_timeout_s  # nobody knows what became of them
    assert breaker.permits


def test_cool_downs_double_when_probes_fail_and_start_anew_when_all_was_well() -> None:
    breaker, clock = make(draw=1.0)
    fail(breaker)
    seen = []
    for _ in range(6):
        seen.append(breaker.retry_after_s)
        clock.now += breaker.retry_after_s
        breaker.failed()
    assert seen == [2.0, 4.0, 8.0, 16.0, 16.0, 16.0]
    clock.now += breaker.retry_after_s
    assert breaker.succeeded()
    fail(breaker)
    assert breaker.retry_after_s == 16.0  # it was not well for long
    clock.now += breaker.retry_after_s
    breaker.succeeded()
    clock.now += SETTINGS.window_s + 1
    fail(breaker)
    assert breaker.retry_after_s == 2.0


@given(st.floats(0.0, 1.0, exclude_max=True))
def test_gateways_do_not_all_try_again_at_once(draw: float) -> None:
    breaker, _ = make(draw)
    fail(breaker)
    assert breaker.retry_after_s == SETTINGS.cool_down_s * (0.5 + 0.5 * draw)


@given(st.lists(st.floats(0.0, 0.5), max_size=40), st.integers(1, 8))
def test_slow_start_lets_twice_as_many_in_each_time(pauses: list[float], first: int) -> None:
    clock = Clock()
    start = SlowStart(clock, first=first, doubling_s=0.5, duration_s=2.0)
    assert start.permits  # it never was away
    start.begin()
    num_in = 0
    for pause in pauses:
        clock.now += pause
        while start.active and start.permits:
            start.chosen()
            num_in += 1
        if start.active:
            assert num_in == first * 2 ** int(clock.now / 0.5)
    clock.now += 2.0
    assert start.permits
    assert not start.active


def test_crashes_are_counted_until_a_token_comes() -> None:
    crashes = Crashes(3)
    crashes.crashed([0, 1])
    crashes.crashed([0, 1])
    crashes.got_token(0)
    assert crashes.worst([0]) == 0
    assert crashes.worst([0, 1, 2]) == 2
    crashes.told([1, 2], 1)
    assert (crashes.worst([1]), crashes.worst([2])) == (2, 1)
    assert crashes.worst([]) == 0
