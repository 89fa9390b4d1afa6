"""How many steps are in flight: more than the window where they are short."""

import pytest

from services.scheduler.batcher import MAX_WINDOW
from tests.model_shard import ModelShard
from tests.unit.scheduler.world import World


def num_in_flight(lead_s: float, window: int = 2) -> int:
    """Of a stream whose steps take 10 ms each, once that is known."""
    shard = ModelShard(window=max(window, MAX_WINDOW) if lead_s else window)
    world = World(shard, window=window, lead_s=lead_s)
    world.submit([2, 3], max_tokens=40, ignore_eos=True)
    for _ in range(8):
        while world.send():
            pass
        num_sent = len(shard.queue)
        world.answer()
    return num_sent


@pytest.mark.parametrize(
    ("lead_s", "expected"),
    [(0.0, 2), (0.005, 2), (0.02, 2), (0.025, 3), (0.035, 4), (1.0, 4)],
)
def test_steps_in_flight_last_for_the_lead_and_are_two_at_least_and_four_at_most(
    lead_s: float, expected: int
) -> None:
    assert num_in_flight(lead_s) == expected


def test_larger_window_holds_whatever_the_lead() -> None:
    assert num_in_flight(0.005, window=6) == 6
    assert num_in_flight(0.0, window=1) == 1


def test_window_alone_counts_until_it_is_known_how_long_steps_take() -> None:
    world = World(ModelShard(window=MAX_WINDOW), window=2, lead_s=1.0)
    world.submit([2, 3], max_tokens=40, ignore_eos=True)
    while world.send():
        pass
    assert len(world.shard.queue) == 2
