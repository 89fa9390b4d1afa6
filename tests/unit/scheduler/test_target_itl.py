"""The whole scheduler under a target, on a device that says how long its steps took."""

from __future__ import annotations

from services.scheduler.ledger import AppliedStep
from tests.model_shard import ModelShard
from tests.unit.scheduler.desk import Desk

STREAM, PROMPT = 1, 2
DECODE_US, TOKEN_US = 1000.0, 100.0


def desk(target_itl_s: float | None) -> Desk:
    """A stream that decodes at a millisecond a step, after a prompt of 32 tokens was seen."""
    shard = ModelShard(num_blocks=200, max_batch_tokens=32)
    shard.step_us = lambda tokens: DECODE_US + TOKEN_US * sum(n for n in tokens if n > 1)
    made = Desk(shard, target_itl_s=target_itl_s)
    made.submit(PROMPT - 2, [5] * 32, max_tokens=1)
    made.run()
    made.submit(STREAM, [2, 3, 4], max_tokens=60)
    step(made, 20)
    return made


def step(made: Desk, count: int = 1) -> list[AppliedStep]:
    """So many steps, the window kept full; those that were answered."""
    answered = []
    for _ in range(count):
        while made.send():
            pass
        answered.append(made.batcher.in_flight[0])
        made.answer(step_s=0.001)
    return answered


def prompt_chunks(made: Desk) -> list[int]:
    made.submit(PROMPT, [6] * 80, max_tokens=1)
    return [one.num_known for one in step(made, 12) if one.num_known]


def test_prompt_runs_in_chunks_that_keep_the_target() -> None:
    chunks = prompt_chunks(desk(target_itl_s=0.0025))  # time for 15 tokens
    assert sum(chunks) == 80
    assert 13 <= max(chunks) <= 15
    assert max(chunks) - min(chunks[:-1]) <= 1


def test_prompt_fills_the_steps_when_there_is_no_target() -> None:
    assert prompt_chunks(desk(target_itl_s=None)) == [31, 31, 18]


def test_step_says_what_it_could_have_held_and_how_long_it_was_to_take() -> None:
    made = desk(target_itl_s=0.0025)
    made.submit(PROMPT, [6] * 80, max_tokens=1)
    step(made, 2)
    (first,) = step(made)
    assert first.budget == first.num_tokens
    assert first.expected_s is not None
    assert 0.0023 < first.expected_s <= 0.0025


def test_failed_step_teaches_nothing() -> None:
    made = desk(target_itl_s=0.0025)
    budget = made.batcher.token_budget
    assert budget is not None
    before = budget.target()
    while made.send():
        pass
    made.shard.failing_slots.add(made.batcher.in_flight[0].rows[0].placement.slot)
    made.shard.step_us = lambda tokens: 1.0
    while made.answer():
        pass
    assert (STREAM, 0) in made.listener.endings
    assert budget.target() == before
    made.submit(STREAM + 10, [2, 3, 4], max_tokens=1)
    made.run()
    assert budget.target() != before


def test_deadline_counts_the_steps_that_a_prompt_takes_under_the_target() -> None:
    made = desk(target_itl_s=0.0025)
    prompt_chunks(made)
    known = made.batcher.roster.pace.known_per_step
    assert known is not None
    assert 13 <= known <= 15


def test_step_that_had_no_time_for_more_says_how_fast_prompts_go() -> None:
    made = desk(target_itl_s=0.0025)
    pace = made.batcher.roster.pace
    before = pace.drain_rate()  # of 32 tokens in 10 ms
    prompt_chunks(made)  # 14 tokens a millisecond
    after = pace.drain_rate()
    assert before is not None
    assert after is not None
    assert after > 1.5 * before
