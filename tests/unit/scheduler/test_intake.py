"""What may come in: each refusal names the field, the value and what would be allowed."""

from __future__ import annotations

from typing import Any

import pytest

from infermesh.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest, QueueFull
from services.scheduler.bookings import Bookings
from services.scheduler.intake import Submission, check_input, check_load
from services.scheduler.ledger import Capacity
from services.scheduler.pace import Pace
from services.scheduler.queue import WaitingQueue
from services.scheduler.sequence import Sampling
from tests.unit.scheduler.scene import MODEL, make_request, submission

CAPACITY = Capacity(num_blocks=10, block_size=4, max_num_seqs=4, max_batch_tokens=16)


def queue_with(num_tokens: int, max_tokens: int = 100, **of: Any) -> WaitingQueue:
    queue = WaitingQueue(max_tokens)
    if num_tokens:
        queue.push(make_request(1, [2], **of).sequences[0], num_tokens)
    return queue


def draining(tokens_per_second: int) -> Pace:
    pace = Pace()
    if tokens_per_second:
        pace.left_queue(sent_s=0.0, done_s=1.0, num_tokens=tokens_per_second)
    return pace


def check(
    sub: Submission,
    queue: WaitingQueue,
    pace: Pace | None = None,
    bookings: Bookings | None = None,
    now_s: float = 1.0,
) -> None:
    bookings = Bookings() if bookings is None else bookings
    check_load(sub, CAPACITY, queue, pace or Pace(), bookings, now_s)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prompt_token_ids": [0, 99]},
        {"prompt_token_ids": [2] * 63},
        {"choices": [(1, [99]), (0, [])]},
        {"max_tokens": 0},
        {"max_tokens": None},
        {"min_tokens": 100},
        {"stop_token_ids": frozenset({0, 99})},
        {"sampling": Sampling(None, False, frozenset({0, 99}))},
    ],
)
def test_input_is_taken_when_it_lies_within_the_bounds(changes: dict[str, Any]) -> None:
    check_input(submission(**changes), MODEL)


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"prompt_token_ids": []}, "prompt", "prompt_token_ids is empty: at least one token"),
        ({"prompt_token_ids": [2, 100]}, "prompt", "prompt has token id 100; .* 0 to 99"),
        ({"prompt_token_ids": [2, -1, 200]}, "prompt", "prompt has token id -1; .* 0 to 99"),
        ({"choices": []}, "n", "choices is empty: at least one choice"),
        ({"choices": [(0, []), (3, []), (3, [])]}, "n", "choices names index 3 twice"),
        ({"choices": [(0, []), (1, [5, 100])]}, "choices", "choices has token id 100; .* 0 to 99"),
        (
            {"stop_token_ids": frozenset({3, 1000})},
            "stop_token_ids",
            "stop_token_ids has token id 1000; .* 0 to 99",
        ),
        (
            {"sampling": Sampling(None, False, frozenset({-7}))},
            "logit_bias",
            "logit_bias has token id -7; .* 0 to 99",
        ),
        ({"min_tokens": -2}, "min_tokens", "min_tokens is -2: 0 or more"),
        ({"max_tokens": -3}, "max_tokens", "max_tokens is -3: 0 or more"),
    ],
)
def test_refusal_names_field_value_and_range_when_input_is_wrong(
    changes: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as refusal:
        check_input(submission(**changes), MODEL)
    assert refusal.value.param == param


def test_prompt_is_refused_when_the_context_has_no_place_for_an_output() -> None:
    with pytest.raises(ContextLengthExceeded, match=r"64 tokens; .* of 64 .* one") as refusal:
        check_input(submission(prompt_token_ids=[2] * 64), MODEL)
    assert refusal.value.param == "prompt"


def test_prompt_is_refused_when_the_kv_memory_has_no_place_for_an_output() -> None:
    fitting, too_long = ([2] * length for length in (39, 40))
    check(submission(prompt_token_ids=fitting), queue_with(0))
    with pytest.raises(ContextLengthExceeded, match=r"40 tokens; .* holds 40, one") as refusal:
        check(submission(prompt_token_ids=too_long), queue_with(0))
    assert refusal.value.param == "prompt"


@pytest.mark.parametrize(
    ("choices", "num_tokens"),
    [
        ([(0, [])], 3),
        ([(0, []), (1, [])], 4),  # a fork computes the last prompt token itself
        ([(0, [7, 7]), (1, [7])], 7),
    ],
)
def test_submission_brings_its_prompt_once_and_every_output(
    choices: list[tuple[int, list[int]]], num_tokens: int
) -> None:
    assert submission(prompt_token_ids=[2, 3, 4], choices=choices).num_tokens == num_tokens


@pytest.mark.parametrize(("priority", "most"), [(3, 100), (2, 80), (1, 50)])
def test_lower_classes_are_shed_first_when_the_queue_fills(priority: int, most: int) -> None:
    sub = submission(priority=priority)  # of three tokens
    check(sub, queue_with(most - 3, tenant="another", priority=3))
    with pytest.raises(QueueFull, match=f"{most - 2} of 100 .* 0 of them by this tenant"):
        check(sub, queue_with(most - 2, tenant="another", priority=3))


@pytest.mark.parametrize(("weight", "most"), [(1.0, 64), (4.0, 76), (0.25, 39)])
def test_tenant_leaves_room_for_others_by_its_weight(weight: float, most: int) -> None:
    sub = submission(tenant_weight=weight)
    check(sub, queue_with(most - 1))
    with pytest.raises(QueueFull, match=f"{most} of 100 .* {most} of them by this tenant"):
        check(sub, queue_with(most))
    check(submission(tenant="another", tenant_weight=weight), queue_with(most))


def test_empty_queue_takes_what_is_longer_than_its_bound() -> None:
    check(submission(prompt_token_ids=[2] * 30, priority=1), queue_with(0, max_tokens=4))
    with pytest.raises(QueueFull):
        check(submission(), queue_with(1, max_tokens=3))


def test_resumed_stream_is_let_in_when_the_queue_is_full() -> None:
    check(submission(choices=[(0, [7])]), queue_with(100))


@pytest.mark.parametrize(
    ("taken", "tokens_per_second", "retry_after_s"),
    [(100, 2, 11.5), (117, 10, 4.0), (78, 1000, 0.1), (100, 0, 1.0), (100, 1, 23.0)],
    ids=["excess over rate", "longer", "at least", "unknown rate", "slow"],
)
def test_retry_time_is_what_the_excess_takes_at_the_tenants_share_of_the_rate(
    taken: int, tokens_per_second: int, retry_after_s: float
) -> None:
    queue = queue_with(taken, tenant="tenant", priority=3)
    sub = submission(tenant="tenant", priority=2, tenant_weight=1000.0)  # the class's bound alone
    with pytest.raises(QueueFull) as refusal:
        check(sub, queue, draining(tokens_per_second))
    assert refusal.value.retry_after_s == pytest.approx(retry_after_s)


def test_retry_time_grows_with_those_who_were_told_before() -> None:
    queue, pace, bookings = queue_with(90, tenant="another", priority=3), draining(10), Bookings()
    waits = []
    for first in range(4):
        with pytest.raises(QueueFull) as refusal:
            check(submission(prompt_token_ids=[first] * 10), queue, pace, bookings)
        waits.append(refusal.value.retry_after_s)
    # half of 10 tokens a second is its share: 20 too many, then 10 more each, and a tenth
    assert waits == pytest.approx([4.0, 6.2, 8.4, 10.6])


@pytest.mark.parametrize(
    ("remaining_s", "is_refused"),
    [(None, False), (5.0, False), (4.9, True), (0.0, True), (-1.0, True)],
)
def test_deadline_is_refused_when_the_queue_takes_longer(
    remaining_s: float | None, is_refused: bool
) -> None:
    sub, queue = submission(remaining_s=remaining_s), queue_with(40)
    if not is_refused:
        check(sub, queue, draining(10))
        return
    with pytest.raises(
        DeadlineExceeded, match=f"about 5.0 s .* the deadline is in {remaining_s} s"
    ):
        check(sub, queue, draining(10))


def test_deadline_counts_what_is_served_before_a_newcomer_of_its_tenant() -> None:
    queue = queue_with(40, tenant="flooding")
    check(submission(tenant="another", remaining_s=0.5), queue, draining(10))
    with pytest.raises(DeadlineExceeded):
        check(submission(tenant="flooding", remaining_s=0.5), queue, draining(10))


def test_deadline_is_believed_when_no_rate_is_known() -> None:
    check(submission(remaining_s=0.1), queue_with(60))


def test_deadline_counts_the_steps_that_a_prompt_takes_beside_running_streams() -> None:
    sub, pace = submission(prompt_token_ids=[2] * 32, max_tokens=1, remaining_s=5.0), draining(100)
    pace.step(1.0)
    check(sub, queue_with(1), pace)  # two steps of 16, and the one that is planned already
    pace.known_per_step = 8
    with pytest.raises(DeadlineExceeded):
        check(sub, queue_with(1), pace)
