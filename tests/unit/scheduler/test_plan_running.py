"""`plan` for those who run: decodes first, chunks of prompts, turns, preemption, out of memory."""

from __future__ import annotations

import pytest

from services.scheduler.blocks import BlockPool
from services.scheduler.sequence import Sequence
from tests.unit.scheduler.scene import Scene, row_counts


def books(scene: Scene) -> tuple[object, ...]:
    """All that a plan could change, by value."""
    pool: BlockPool = scene.ledger.pool
    places = [
        (s.placement.num_planned, list(s.placement.block_ids), s.waits_for)
        for s in scene.ledger.running
        if s.placement is not None
    ]
    waiting = [(s.order, s.waits_for) for p in (1, 2, 3) for s in scene.queue.turns(p)]
    counts = (pool.num_free, pool.num_cached, pool.num_used, len(scene.ledger.cache))
    return places, waiting, counts, set(scene.ledger.cache.filling), scene.ledger.num_free_slots


def test_plan_changes_nothing_when_it_admits_defers_and_preempts() -> None:
    scene = Scene()
    scene.run(8)
    scene.run(8, planned=4, priority=1)
    for prompt in ([5] * 9, [5] * 9, 40):
        scene.wait(prompt, priority=3)
    before, first = books(scene), scene.plan()
    assert first.rows
    assert first.admissions
    assert first.deferred
    assert first.preempted
    assert books(scene) == before
    assert scene.plan() == first


def test_decodes_come_before_prefill_when_the_budget_is_short() -> None:
    scene = Scene()
    prefill = scene.run(20, planned=4, priority=3)
    decodes = [scene.run(3, priority=1), scene.run(3)]
    assert row_counts(scene.plan(budget=8)) == [
        (decodes[0], 1),
        (decodes[1], 1),
        (prefill, 6),
    ]


def test_decodes_alone_run_when_they_use_up_the_budget() -> None:
    scene = Scene()
    scene.run(20, planned=4, priority=3)
    decodes = [scene.run(3), scene.run(3)]
    scene.wait(3, priority=3)
    step_plan = scene.plan(budget=2)
    assert row_counts(step_plan) == [(decode, 1) for decode in decodes]
    assert not step_plan.admissions


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


def test_decodes_of_a_higher_class_go_first_when_not_all_can() -> None:
    scene = Scene()
    scene.run(2, priority=1)
    high = scene.run(2, priority=3)
    scene.run(2, priority=2)
    assert row_counts(scene.plan(budget=1)) == [(high, 1)]


def test_prompt_runs_in_chunks_when_it_is_longer_than_the_budget() -> None:
    scene = Scene()
    sequence = scene.wait(20)
    chunks: list[tuple[int, bool]] = []
    for _ in range(4):
        step = scene.apply(scene.plan(budget=8))
        chunks += [(row.end - row.first, row.samples) for row in step.rows]
        scene.execute()
    assert chunks == [(8, False), (8, False), (4, True), (1, True)]
    assert sequence.token_ids[20:] == [99, 99]


def test_prompts_share_the_budget_by_class_and_then_in_their_order() -> None:
    scene = Scene(num_blocks=32)
    low = scene.run(20, planned=4, priority=1)
    first = scene.run(10, planned=4)
    second = scene.run(10, planned=4)
    high = scene.wait(5, priority=3)
    step_plan = scene.plan(budget=14)
    assert row_counts(step_plan) == [(first, 6), (second, 3)]
    assert [(a.sequence, a.num_tokens) for a in step_plan.admissions] == [(high, 5)]
    assert (low, 2) in row_counts(scene.plan(budget=19))


def test_decode_is_planned_again_when_its_last_token_is_still_in_flight() -> None:
    scene = Scene()
    sequence = scene.run(3, in_flight=True)
    step = scene.apply(scene.plan())
    assert [(row.first, row.end, row.from_last) for row in step.rows] == [(3, 4, True)]
    assert sequence.num_output == 0


def test_nothing_is_planned_when_the_last_allowed_token_is_in_flight() -> None:
    scene = Scene()
    scene.run(3, in_flight=True, max_len=4)
    assert scene.plan().is_empty


def full_pool(*priorities: int) -> tuple[Scene, list[Sequence]]:
    """Decodes that hold one full block each and need another; nothing is left."""
    scene = Scene(num_blocks=len(priorities), caching=False)
    return scene, [scene.run(4, priority=priority) for priority in priorities]


@pytest.mark.parametrize(
    ("priorities", "victim"),
    [((2, 2, 2), 2), ((2, 1, 2), 1), ((1, 2, 1), 2), ((3, 2, 3), 1), ((2, 3, 3), 0)],
)
def test_preempted_is_the_lowest_class_and_then_the_youngest(
    priorities: tuple[int, ...], victim: int
) -> None:
    scene, sequences = full_pool(*priorities)
    step_plan = scene.plan()
    assert step_plan.preempted[0] is sequences[victim]


def test_preempted_gives_its_row_and_its_budget_back_when_it_was_planned() -> None:
    scene = Scene(num_blocks=3, caching=False)
    old = scene.run(4)  # needs a block for its next token
    prefill = scene.run(8, planned=2)
    victim = scene.run(3, priority=1)  # needs none: it is planned first, then taken back
    step_plan = scene.plan(budget=3)
    assert row_counts(step_plan) == [(old, 1), (prefill, 2)]
    assert step_plan.preempted == [victim]


def test_one_preemption_is_enough_when_it_frees_several_blocks() -> None:
    scene = Scene(num_blocks=4, caching=False)
    needy = [scene.run(4), scene.run(4)]
    youngest = scene.run(7)  # two blocks, and room for its next token
    step_plan = scene.plan()
    assert step_plan.preempted == [youngest]
    assert row_counts(step_plan) == [(needy[0], 1), (needy[1], 1)]


def test_shared_blocks_do_not_count_when_their_reader_is_preempted() -> None:
    scene = Scene(num_blocks=3, caching=False)
    needy, second, third = scene.run(4), scene.run(3), scene.run(3)
    scene.ledger.pool.hold(third.placement.block_ids)  # as another reader of the prefix would
    step_plan = scene.plan()
    assert step_plan.preempted == [third, second]
    assert row_counts(step_plan) == [(needy, 1)]


def test_running_waits_when_blocks_of_an_ended_one_are_on_their_way() -> None:
    scene = Scene(num_blocks=4, caching=False)
    needy, other, ending = scene.run(4), scene.run(4), scene.run(3)
    scene.decode(ending)
    scene.finish(ending)
    scene.fill_pool()
    assert scene.plan().is_empty
    assert not scene.plan().frees_places
    scene.execute()
    assert row_counts(scene.plan())[0] == (needy, 1)
    assert scene.plan().preempted == [other]


def test_blocks_of_a_preempted_one_count_only_when_its_steps_have_run() -> None:
    scene = Scene(num_blocks=4, caching=False)
    needy, second, victim = scene.run(4), scene.run(3), scene.run(3)
    scene.decode(victim)
    scene.fill_pool()
    step_plan = scene.plan()
    assert step_plan.preempted == [victim]  # and nobody else: its block will come
    assert row_counts(step_plan) == [(second, 1)]
    scene.apply(step_plan)
    scene.execute()
    assert (needy, 1) in row_counts(scene.plan())


def test_youngest_gives_itself_up_when_it_is_the_one_that_needs_a_block() -> None:
    scene = Scene(num_blocks=2, caching=False)
    old, young = scene.run(3), scene.run(4)
    step_plan = scene.plan()
    assert step_plan.preempted == [young]
    assert row_counts(step_plan) == [(old, 1)]


def test_prefill_makes_room_when_no_block_is_left_for_its_next_chunk() -> None:
    scene = Scene(num_blocks=2, caching=False)
    old = scene.run(8, planned=4)
    young = scene.run(8, planned=4, priority=1)
    step_plan = scene.plan()
    assert step_plan.preempted == [young]
    assert row_counts(step_plan) == [(old, 4)]


def test_prefill_takes_what_fits_when_few_blocks_are_left() -> None:
    scene = Scene(num_blocks=3, caching=False)
    sequence = scene.run(20, planned=6)
    (row,) = scene.plan().rows
    assert (row.sequence, row.num_tokens, row.num_new_blocks) == (sequence, 6, 1)


def test_last_one_left_stays_when_the_others_gave_nothing() -> None:
    scene = Scene(num_blocks=2, caching=False)
    needy, other = scene.run(4), scene.run(3)
    scene.ledger.pool.hold(other.placement.block_ids)
    step_plan = scene.plan()
    assert step_plan.preempted == [other]
    assert not step_plan.out_of_memory
    assert needy.placement is not None


def test_running_is_out_of_memory_when_it_is_alone_and_needs_another_block() -> None:
    scene = Scene(num_blocks=1)
    sequence = scene.run(3)
    scene.decode(sequence)
    assert scene.plan().is_empty  # not before its token in flight is known: it may be the last
    assert not scene.plan().out_of_memory
    scene.execute()
    assert scene.plan().out_of_memory == [sequence]
    assert not scene.plan().preempted
