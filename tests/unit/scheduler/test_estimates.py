"""What is refused for its deadline: only what the device was seen to be too slow for."""

from __future__ import annotations

import pytest

from infermesh.errors import DeadlineExceeded, QueueFull
from tests.model_shard import ModelShard
from tests.unit.scheduler.desk import Desk


def busy_desk(max_queue_tokens: int = 100_000) -> Desk:
    """One place, taken by a stream that decodes at 5 ms a step."""
    desk = Desk(ModelShard(max_batch_tokens=32, max_num_seqs=1), max_queue_tokens=max_queue_tokens)
    desk.submit(1, [2, 3, 4], max_tokens=80)
    for _ in range(40):
        desk.send()
        desk.answer(step_s=0.005)
    return desk


def prefill_slowly(desk: Desk) -> None:
    """Prompts fill steps of 32 tokens that take a second each."""
    for stream_id in (2, 3, 4):
        desk.submit(stream_id, [stream_id] * 64, max_tokens=1)
    while (4, 0) not in desk.listener.endings:
        desk.send()
        desk.answer(step_s=1.0)


def wait_in_line(desk: Desk, num_prompts: int = 12, priority: int = 2) -> None:
    for i in range(num_prompts):
        desk.submit(100 + i, [5 + i] * 90, priority=priority)


def test_deadline_is_believed_when_only_decodes_were_seen() -> None:
    desk = busy_desk()  # 200 tokens a second, 1,080 waiting: no reason to think of 5 seconds
    wait_in_line(desk)
    desk.submit(50, [2] * 90, remaining_s=4.0)
    assert (50, 0) not in desk.listener.endings


def test_deadline_is_refused_when_the_queue_was_seen_to_be_too_slow_for_it() -> None:
    desk = busy_desk()
    prefill_slowly(desk)
    wait_in_line(desk)
    with pytest.raises(DeadlineExceeded, match=r"about \d+\.\d s .* the deadline is in 40\.0 s"):
        desk.submit(50, [2] * 90, remaining_s=40.0)
    desk.submit(51, [2] * 90, remaining_s=160.0)
    while (51, 0) not in desk.listener.endings:
        desk.send()
        desk.answer(step_s=1.0)
        desk.batcher.expire()
    assert desk.listener.endings[51, 0].error is None


def test_answers_own_time_counts_when_it_has_to_wait() -> None:
    desk = busy_desk()
    desk.submit(2, [3] * 32, max_tokens=1)
    desk.submit(3, [4] * 32, max_tokens=1)
    while (2, 0) not in desk.listener.endings:  # stream 3 waits meanwhile
        desk.send()
        desk.answer(step_s=1.0)
    with pytest.raises(DeadlineExceeded):  # its 80 tokens alone take more
        desk.submit(50, [2] * 8, min_tokens=80, max_tokens=80, remaining_s=60.0)
    desk.submit(51, [2] * 8, max_tokens=1, remaining_s=60.0)


def test_resumed_stream_is_taken_when_a_new_one_would_be_refused() -> None:
    desk = busy_desk()
    prefill_slowly(desk)
    wait_in_line(desk)
    desk.submit(50, [2] * 90, outputs=[[], [7]], remaining_s=1.0)
    with pytest.raises(DeadlineExceeded):  # that is no estimate
        desk.submit(51, [2] * 90, outputs=[[], [7]], remaining_s=0.0)


def test_deadline_counts_only_the_classes_served_first() -> None:
    desk = busy_desk()
    prefill_slowly(desk)
    wait_in_line(desk, priority=2)
    desk.submit(50, [2] * 90, priority=3, remaining_s=1.0)
    with pytest.raises(DeadlineExceeded):
        desk.submit(51, [2] * 90, priority=1, remaining_s=20.0)


def test_retry_time_is_a_guess_when_only_decodes_were_seen() -> None:
    desk = busy_desk(max_queue_tokens=1400)
    wait_in_line(desk, num_prompts=10)
    with pytest.raises(QueueFull) as refusal:
        desk.submit(50, [2] * 90)
    assert refusal.value.retry_after_s == 1.0  # at the pace of decodes it would be far more


def test_client_gets_in_when_it_comes_back_as_told() -> None:
    desk = busy_desk(max_queue_tokens=1400)
    prefill_slowly(desk)
    wait_in_line(desk, num_prompts=10)
    with pytest.raises(QueueFull) as refusal:
        desk.submit(50, [2] * 90)
    assert refusal.value.retry_after_s is not None
    due_s = desk.now_s + refusal.value.retry_after_s
    with pytest.raises(QueueFull) as again:  # too early: the same time
        desk.submit(50, [2] * 90)
    assert desk.now_s + (again.value.retry_after_s or 0.0) == pytest.approx(due_s)
    while desk.now_s < due_s:
        desk.send()
        desk.answer(step_s=1.0)
    with pytest.raises(QueueFull):  # somebody else does not take its place
        desk.submit(51, [3] * 90)
    desk.submit(50, [2] * 90)
