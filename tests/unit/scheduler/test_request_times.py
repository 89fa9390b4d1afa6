"""Where a replica's histograms say that a request's time went."""

from prometheus_client import REGISTRY

from services.scheduler.request_times import RequestTimes
from services.scheduler.sequence import Timeline

LINE = Timeline(arrived_s=10.0, first_step_s=10.5, first_token_s=12.5, last_token_s=16.5)


def sums() -> dict[str, float]:
    names = ("queue_time", "prefill_time", "decode_time", "time_per_output_token")
    return {
        name: REGISTRY.get_sample_value(f"infermesh_request_{name}_seconds_sum") or 0.0
        for name in names
    }


def spent(since: dict[str, float]) -> dict[str, float]:
    return {name: round(value - since[name], 6) for name, value in sums().items()}


def test_times_are_the_parts_of_a_timeline() -> None:
    times = RequestTimes()
    before = sums()
    times.first_token(LINE)
    times.ended(LINE, 9)
    assert spent(before) == {
        "queue_time": 0.5,
        "prefill_time": 2.0,
        "decode_time": 4.0,
        "time_per_output_token": 0.5,
    }


def test_one_token_has_no_time_between_tokens() -> None:
    times = RequestTimes()
    before = sums()
    times.ended(LINE, 1)
    times.ended(Timeline(10.0), 0)
    assert set(spent(before).values()) == {0.0}
