"""`plan` for those who run: decodes first, chunks of prompts, turns, preemption, out of memory."""

from __future__ import annotations

from services.scheduler.sequence import Sequence
from tests.unit.scheduler.scene import Scene, row_counts


def test_decodes_take_turns_when_there_are_more_than_the_budget() -> None:
    scene = Scene()
    decodes = [scene.run(2) for _ in range(3)]
    turns: list[Sequence] = []
    for _ in range(3):
        step_plan = scene.plan(budget=2)
        turns += [sequence for sequence, _ in row_counts(step_plan)]
        scene.apply(step_plan)
        scene.execute()
    assert [turns.count(decode) for decode in decodes] == [2, 2, 2]
