"""What the replica knows of its own pace: drain rate, time of an answer."""

from __future__ import annotations

import pytest

from services.scheduler.pace import Pace, Throughput


def test_drain_rate_counts_the_time_that_the_device_was_busy() -> None:
    throughput = Throughput()
    assert throughput.drain_rate() is None
    throughput.record(sent_s=0.0, done_s=1.0, num_tokens=100)
    throughput.record(sent_s=0.5, done_s=2.0, num_tokens=100)  # overlaps the first: 1 s busy
    throughput.record(sent_s=6.0, done_s=8.0, num_tokens=200)  # after 4 s of idling
    assert throughput.drain_rate() == pytest.approx(400 / 4)
    assert throughput.tokens_per_second(now_s=8.0) == pytest.approx(400 / 8)


def test_drain_rate_forgets_old_steps_but_never_the_last_one() -> None:
    throughput = Throughput(horizon_s=10.0)
    throughput.record(sent_s=0.0, done_s=1.0, num_tokens=1000)
    throughput.record(sent_s=20.0, done_s=21.0, num_tokens=10)
    assert throughput.drain_rate() == pytest.approx(10)
    throughput.tokens_per_second(now_s=500.0)
    assert throughput.drain_rate() == pytest.approx(10)


def test_rate_of_leaving_goes_before_that_of_full_steps() -> None:
    pace = Pace()
    assert pace.drain_rate() is None
    assert pace.seconds_for(10) is None
    pace.computed(0.0, 1.0, 500)
    assert pace.drain_rate() == pytest.approx(500)
    pace.left_queue(1.0, 2.0, 0)  # places are full: no evidence yet
    assert pace.drain_rate() == pytest.approx(500)
    pace.left_queue(2.0, 4.0, 60)
    assert pace.drain_rate() == pytest.approx(20)
    assert pace.seconds_for(50) == pytest.approx(2.5)


def test_pause_is_the_longest_time_between_departures_while_others_wait() -> None:
    pace = Pace()
    for step, num_tokens in enumerate([60, 60, 0, 0, 60, 0, 60]):
        pace.left_queue(float(step), step + 1.0, num_tokens)
    assert pace.pause_s == pytest.approx(3.0)
    pace.queue_emptied()
    pace.left_queue(100.0, 101.0, 60)
    assert pace.pause_s == pytest.approx(3.0)


def test_answer_takes_its_prompts_steps_and_one_for_each_usual_token() -> None:
    pace = Pace()
    assert pace.service_s(3, 100, 100) == 0.0
    pace.step(0.1)
    assert pace.service_s(3, 0, None) == pytest.approx(0.4)  # nobody has answered yet
    pace.answered(10)
    assert pace.service_s(3, 0, None) == pytest.approx(1.3)
    assert pace.service_s(1, 0, 4) == pytest.approx(0.5)
    assert pace.service_s(1, 20, 30) == pytest.approx(2.1)
