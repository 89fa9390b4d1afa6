"""The budget on a device with a law of its own: it keeps the target, and prompts always move."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.step_cost import Law, Work
from services.scheduler.token_budget import StepTarget
from tests.unit.scheduler.stepped_device import BLOCK_SIZE, MOST, Device, bent, straight

LONG = 4096
LAWS = (straight, bent)
# The streams' steps alone take some 4.7 or 4.1 ms.
TARGET_S = 0.0095


def warm(law: Callable[[Work], float], **noise: float) -> Device:
    """A device that has seen a prompt alone, streams alone, and one prompt beside streams."""
    device = Device(law, TARGET_S, **noise)
    device.prompt(MOST, streams=False)
    device.decode(20)
    device.prompt(LONG)
    device.decode(20)
    return device


@pytest.mark.parametrize("law", LAWS)
def test_target_is_met_and_used_when_the_law_is_known(law: Callable[[Work], float]) -> None:
    steps = warm(law).prompt(LONG)
    assert max(seconds for _, seconds in steps) <= 1.06 * TARGET_S
    assert statistics.median(seconds for _, seconds in steps[:-1]) >= 0.9 * TARGET_S


@pytest.mark.parametrize(("law", "used"), [(straight, 0.95), (bent, 0.5)])
def test_target_is_met_within_16_steps_when_nothing_was_known(
    law: Callable[[Work], float], used: float
) -> None:
    device = Device(law, TARGET_S)
    device.decode(1)
    steps = device.prompt(LONG)
    assert steps[0][0] == BLOCK_SIZE  # a guess would be one on the streams' cost
    assert max(seconds for _, seconds in steps) <= 1.1 * TARGET_S
    late = [seconds for _, seconds in steps[16:-1]]
    assert min(late) >= used * TARGET_S


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("law", LAWS)
def test_target_is_kept_by_most_steps_when_times_are_noisy_and_some_stall(
    law: Callable[[Work], float], seed: int
) -> None:
    device = warm(law, noise=0.05, stalls=0.02, seed=seed)
    steps = [step for _ in range(3) for step in device.prompt(LONG)[:-1]]
    over = sum(seconds > 1.1 * TARGET_S for _, seconds in steps)
    assert over <= 0.02 * len(steps)
    assert statistics.mean(seconds for _, seconds in steps) >= 0.7 * TARGET_S


def test_aim_is_below_the_target_by_what_expectations_are_off() -> None:
    exact, noisy, wild = (warm(straight, noise=noise) for noise in (0.0, 0.05, 0.5))
    assert exact.budget.target().aim_s == pytest.approx(TARGET_S, rel=0.01)
    assert 0.8 * TARGET_S <= noisy.budget.target().aim_s <= 0.96 * TARGET_S
    assert wild.budget.target().aim_s == pytest.approx(TARGET_S / 1.25)


@pytest.mark.parametrize(("before", "after"), [(1.0, 1.6), (1.6, 1.0)])
def test_target_is_met_again_within_ten_steps_when_the_device_changes_its_pace(
    before: float, after: float
) -> None:
    pace = before
    device = warm(lambda work: pace * straight(work))
    device.prompt(LONG // 2)
    pace = after
    steps = [*device.prompt(LONG), *device.prompt(LONG)]
    late = [seconds for _, seconds in steps[10:] if seconds]
    assert max(late) <= 1.05 * TARGET_S
    assert statistics.median(late) >= 0.8 * TARGET_S


def test_prompt_moves_by_a_block_per_step_when_decoding_alone_takes_longer_than_the_target() -> (
    None
):
    device = Device(straight, 0.001)
    device.prompt(MOST, streams=False)
    device.decode(20)
    steps = device.prompt(LONG)
    assert [count for count, _ in steps] == [BLOCK_SIZE] * (LONG // BLOCK_SIZE)


def test_prompt_has_the_whole_step_when_nothing_decodes() -> None:
    steps = warm(straight).prompt(LONG, streams=False)
    assert [count for count, _ in steps] == [MOST] * (LONG // MOST)


def test_chunks_shrink_as_what_they_read_grows() -> None:
    device = warm(straight)
    counts = [count for count, _ in device.prompt(4 * LONG)]
    assert counts[-2] < 0.7 * counts[5]


PRICES = st.floats(0, 1e-3)


@settings(max_examples=200)
@given(
    st.builds(Law, PRICES, st.floats(0, 1e-6), st.floats(0, 0.1), PRICES, st.floats(0, 1e-6)),
    st.floats(0, 0.2),
    st.integers(0, 1000),
    st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 700)), min_size=1, max_size=5),
)
def test_step_is_expected_to_end_in_time_or_holds_a_block_at_most(
    law: Law, aim_s: float, reach: int, prompts: list[tuple[int, int]]
) -> None:
    time = StepTarget(law, aim_s, reach, BLOCK_SIZE).beside(16, 16_000)
    taken = 0
    for first, length in prompts:
        count = min(length, time.tokens_from(first))
        assert count >= min(length, BLOCK_SIZE - taken)  # it moves
        time.take(first, count)
        taken += count
        if time.is_spent:
            break
    assert taken <= max(reach, BLOCK_SIZE)
    assert time.expected_s <= aim_s * (1 + 1e-9) + 1e-12 or taken <= BLOCK_SIZE
    assert time.expected_s >= law.seconds(Work(num_decodes=16, decode_context=16_000))
