"""What may come in: each refusal names the field, the value and what would be allowed."""

from __future__ import annotations

from typing import Any

import pytest

from infermesh.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest, QueueFull
from services.scheduler.intake import check_input, check_load
from services.scheduler.ledger import Capacity
from services.scheduler.queue import Throughput, WaitingQueue
from services.scheduler.sequence import Sampling
from tests.unit.scheduler.scene import MODEL, make_request, submission

CAPACITY = Capacity(num_blocks=10, block_size=4, max_num_seqs=4, max_batch_tokens=16)


def queue_with(num_tokens: int, max_tokens: int = 100) -> WaitingQueue:
    queue = WaitingQueue(max_tokens)
    if num_tokens:
        queue.push(make_request(1, [2]).sequences[0], num_tokens)
    return queue


def draining(tokens_per_second: int) -> Throughput:
    throughput = Throughput()
    throughput.record(sent_s=0.0, done_s=1.0, num_tokens=tokens_per_second)
    return throughput


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
    check_load(submission(prompt_token_ids=fitting), CAPACITY, queue_with(0), Throughput())
    with pytest.raises(ContextLengthExceeded, match=r"40 tokens; .* holds 40, one") as refusal:
        check_load(submission(prompt_token_ids=too_long), CAPACITY, queue_with(0), Throughput())
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


def test_submission_is_let_in_until_the_queue_is_full() -> None:
    three_tokens = submission()
    check_load(three_tokens, CAPACITY, queue_with(97), Throughput())
    with pytest.raises(QueueFull, match="98 of 100 queue tokens are taken"):
        check_load(three_tokens, CAPACITY, queue_with(98), Throughput())


@pytest.mark.parametrize(
    ("taken", "tokens_per_second", "retry_after_s"),
    [(100, 2, 1.5), (117, 10, 2.0), (98, 1000, 0.1), (100, 0, 1.0)],
    ids=["excess over rate", "longer", "at least", "unknown rate"],
)
def test_retry_time_is_what_the_excess_takes_at_the_drain_rate(
    taken: int, tokens_per_second: int, retry_after_s: float
) -> None:
    throughput = draining(tokens_per_second) if tokens_per_second else Throughput()
    with pytest.raises(QueueFull) as refusal:
        check_load(submission(), CAPACITY, queue_with(taken), throughput)
    assert refusal.value.retry_after_s == pytest.approx(retry_after_s)


@pytest.mark.parametrize(
    ("remaining_s", "is_refused"),
    [(None, False), (4.0, False), (3.9, True), (0.0, True), (-1.0, True)],
)
def test_deadline_is_refused_when_the_queue_takes_longer(
    remaining_s: float | None, is_refused: bool
) -> None:
    sub, queue = submission(remaining_s=remaining_s), queue_with(40)
    if not is_refused:
        check_load(sub, CAPACITY, queue, draining(10))
        return
    with pytest.raises(DeadlineExceeded, match=f"about 4.0 s, the deadline is in {remaining_s} s"):
        check_load(sub, CAPACITY, queue, draining(10))


def test_deadline_is_believed_when_no_rate_is_known() -> None:
    check_load(submission(remaining_s=0.1), CAPACITY, queue_with(90), Throughput())
