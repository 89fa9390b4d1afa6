"""How long silence must last before a peer counts as wedged."""

from hypothesis import given
from hypothesis import strategies as st

from infermesh.stall import Patience, Silence


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_own_stall_is_no_silence_of_others() -> None:
    clock = Clock()
    silence = Silence(clock, longest_look_s=0.5)
    clock.now += 60.0  # this process was stopped
    assert silence.look() == 0.5
    for _ in range(4):
        clock.now += 0.25
        seen = silence.look()
    assert seen == 1.5
    silence.heard()
    assert silence.look() == 0.0


def test_large_step_is_no_stall_when_only_small_ones_were_seen() -> None:
    pace = Patience(floor_s=2.0, unknown_s=300.0)
    assert pace.limit_s(1) == 300.0  # the first of all may compile
    pace.took(4, 0.01)
    assert pace.limit_s(4) == 2.0
    assert pace.limit_s(512) == 300.0
    pace.took(512, 3.0)
    assert pace.limit_s(512) == 30.0
    assert pace.limit_s(1024) == 60.0
    pace.reset()
    assert pace.limit_s(4) == 300.0


@given(
    st.lists(st.tuples(st.integers(1, 512), st.floats(0.0, 20.0)), min_size=1, max_size=60),
    st.integers(1, 2048),
)
def test_step_like_a_recent_one_is_never_stuck_in_ten_times_its_time(
    steps: list[tuple[int, float]], num_tokens: int
) -> None:
    pace = Patience(floor_s=2.0, unknown_s=300.0)
    for tokens, seconds in steps:
        pace.took(tokens, seconds)
    patience_s = pace.limit_s(num_tokens)
    assert patience_s >= 2.0
    assert patience_s == 300.0 or all(patience_s >= 10 * s for _, s in steps[-32:])
    assert pace.limit_s(max(tokens for tokens, _ in steps)) <= 10 * 512 * 20.0
