"""`plan` under a target: prompts get the time that decodes leave, and decodes always run."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.plan import Limits, plan
from services.scheduler.step_cost import Law
from services.scheduler.step_plan import StepPlan
from services.scheduler.token_budget import StepTarget
from tests.unit.scheduler.scene import Scene, admitted, row_counts

BLOCK = 4
LAW = Law(per_known=0.001, per_pair=0.0, fixed=0.010, per_decode=0.002)


def planned(scene: Scene, aim_s: float, law: Law = LAW, budget: int = 64) -> StepPlan:
    target = StepTarget(law, aim_s, max_known=1000, min_known=BLOCK)
    return plan(scene.state(), Limits(budget, BLOCK, target=target))


def num_known(step_plan: StepPlan) -> int:
    chunks = [row.num_tokens for row in step_plan.rows if row.num_tokens > 1]
    return sum(chunks) + sum(admission.num_tokens for admission in step_plan.admissions)


def test_running_prompt_gets_the_time_that_is_left() -> None:
    scene = Scene(num_blocks=64)
    decodes = [scene.run(3), scene.run(3)]
    prefill = scene.run(60, planned=4)
    step_plan = planned(scene, aim_s=0.0245)  # 14 ms are theirs
    assert row_counts(step_plan) == [*((one, 1) for one in decodes), (prefill, 10)]
    assert step_plan.budget == 12
    assert step_plan.expected_s == pytest.approx(0.024)


def test_waiting_prompt_gets_the_time_that_is_left() -> None:
    scene = Scene(num_blocks=64)
    scene.run(3)
    waiting = scene.wait(60)
    step_plan = planned(scene, aim_s=0.0245)
    assert [(one.sequence, one.num_tokens) for one in step_plan.admissions] == [(waiting, 12)]


def test_next_prompt_gets_what_a_short_one_leaves_and_nothing_when_that_is_no_block() -> None:
    scene = Scene(num_blocks=64)
    scene.run(3)
    short, long, last = scene.wait(5), scene.wait(40), scene.wait(40)
    assert admitted(planned(scene, aim_s=0.0245)) == [short, long]
    assert num_known(planned(scene, aim_s=0.0245)) == 12
    step_plan = planned(scene, aim_s=0.0205)  # time for eight
    assert admitted(step_plan) == [short]
    assert last not in admitted(step_plan)


def test_prompt_moves_by_a_block_when_there_is_no_time_at_all() -> None:
    scene = Scene(num_blocks=64)
    scene.run(3)
    prefill = scene.run(60, planned=4)
    scene.wait(20)
    step_plan = planned(scene, aim_s=0.001)
    assert row_counts(step_plan)[1:] == [(prefill, BLOCK)]
    assert not step_plan.admissions
    assert step_plan.budget == 1 + BLOCK


def test_prompt_gets_fewer_tokens_when_it_has_much_to_read() -> None:
    law = LAW._replace(per_pair=1e-5)
    counts = []
    for planned_before in (4, 400):
        scene = Scene(num_blocks=256)
        scene.run(3)
        scene.run(500, planned=planned_before)
        counts.append(num_known(planned(scene, 0.04, law)))
    assert counts == [24, 5]


def test_prompts_have_the_whole_budget_when_nothing_decodes() -> None:
    scene = Scene(num_blocks=64)
    scene.run(60, planned=4)
    scene.wait(30)
    step_plan = planned(scene, aim_s=0.001)
    assert num_known(step_plan) == step_plan.budget == 64
    assert step_plan.expected_s is None


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(2, 90), st.integers(1, 3)), max_size=6),
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 3)), max_size=6),
    st.floats(0, 0.2),
    st.integers(8, 100),
    st.booleans(),
)
def test_plan_keeps_its_time_and_crowds_no_decode_out(
    num_decodes: int,
    running: list[tuple[int, int]],
    waiting: list[tuple[int, int]],
    aim_s: float,
    budget: int,
    reads: bool,
) -> None:
    scene = Scene(num_blocks=1000, max_num_seqs=32)
    decodes = [scene.run(3) for _ in range(num_decodes)]
    for length, priority in running:
        scene.run(length + 1, planned=1, priority=priority)
    for length, priority in waiting:
        scene.wait(length, priority=priority)
    law = LAW._replace(per_pair=1e-4 if reads else 0.0)
    step_plan = planned(scene, aim_s, law, budget)
    counts = row_counts(step_plan)
    assert counts[: min(num_decodes, budget)] == [(one, 1) for one in decodes][:budget]
    total = sum(count for _, count in counts) + sum(a.num_tokens for a in step_plan.admissions)
    assert total <= step_plan.budget <= budget
    known = total - min(num_decodes, budget)
    assert step_plan.expected_s is not None
    assert step_plan.expected_s <= aim_s + 1e-9 or known <= BLOCK
    if (running or waiting) and num_decodes < budget:
        assert known > 0  # prompts always move
