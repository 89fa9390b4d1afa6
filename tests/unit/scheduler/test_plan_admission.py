"""`plan` for those who wait: who gets a place, who makes way, who waits for another's prefix."""

from __future__ import annotations

import pytest

from services.scheduler.step_plan import Shortage
from tests.unit.scheduler.scene import Scene, admitted, row_counts


def test_waiting_are_admitted_in_order_until_the_budget_is_spent() -> None:
    scene = Scene()
    late, early = scene.arrive(5).sequences[0], scene.wait(6)
    scene.queue.push(late, 5)  # it arrived first: preempted, it keeps its place
    third = scene.wait(4)
    step_plan = scene.plan(budget=9)
    assert [(a.sequence, a.num_tokens) for a in step_plan.admissions] == [(late, 5), (early, 4)]
    assert third not in admitted(step_plan)


def test_higher_class_is_admitted_before_the_chunks_of_a_lower_one() -> None:
    scene = Scene()
    running = scene.run(20, planned=4)
    high, low = scene.wait(6, priority=3), scene.wait(3, priority=1)
    step_plan = scene.plan(budget=10)
    assert admitted(step_plan) == [high]
    assert row_counts(step_plan) == [(running, 4)]
    assert admitted(scene.plan(budget=30)) == [high, low]


@pytest.mark.parametrize("priority", [1, 2], ids=["lower class", "same class"])
def test_nobody_is_admitted_behind_one_that_does_not_fit(priority: int) -> None:
    scene = Scene(num_blocks=8)
    scene.run(4)
    scene.wait(28)
    small = scene.wait(1, priority=priority)
    assert not scene.plan().admissions
    scene.queue.remove(next(iter(scene.queue.turns(2))))
    assert admitted(scene.plan()) == [small]


def test_nobody_is_admitted_when_no_slot_is_free() -> None:
    scene = Scene(max_num_seqs=2)
    scene.run(2)
    first = scene.wait(2)
    scene.wait(2)
    assert admitted(scene.plan()) == [first]


@pytest.mark.parametrize("num_running", [1, 2, 4])
def test_admission_leaves_a_block_for_each_that_runs(num_running: int) -> None:
    scene = Scene(num_blocks=20)
    for _ in range(num_running):
        scene.run(2)
    waiting = scene.wait(6)  # two blocks, and its next token fits in
    scene.fill_pool(leave=2 + num_running - 1)
    assert not scene.plan().admissions
    scene = Scene(num_blocks=20)
    for _ in range(num_running):
        scene.run(2)
    waiting = scene.wait(6)
    scene.fill_pool(leave=2 + num_running)
    assert admitted(scene.plan()) == [waiting]


def test_preempted_is_not_admitted_again_when_nothing_has_changed() -> None:
    scene = Scene(num_blocks=3, caching=False)
    old, young = scene.run(4), scene.run(8)
    scene.apply(scene.plan())
    assert young in scene.queue
    for _ in range(3):  # the block that it gave up is free, but it would be needed again
        scene.execute()
        step_plan = scene.plan()
        assert not step_plan.admissions
        assert row_counts(step_plan) == [(old, 1)]
        scene.apply(step_plan)


def test_admission_counts_what_running_prompts_will_still_need() -> None:
    scene = Scene(num_blocks=10)
    scene.run(26, planned=4)  # six blocks to go
    scene.wait(10, priority=3)  # three, and one for who runs: one more than there are
    assert not scene.plan().admissions
    scene = Scene(num_blocks=10)
    scene.run(22, planned=4)
    waiting = scene.wait(10, priority=3)
    assert admitted(scene.plan()) == [waiting]


def test_margin_is_waived_when_nobody_else_is_there() -> None:
    scene = Scene(num_blocks=2)
    waiting = scene.wait(8)  # its next token has no block yet
    assert admitted(scene.plan()) == [waiting]


def test_nobody_is_admitted_in_the_plan_that_preempts() -> None:
    scene = Scene(num_blocks=8, caching=False)
    scene.run(4)
    victim = scene.run(12)
    scene.wait(1)
    scene.fill_pool()
    step_plan = scene.plan()
    assert step_plan.preempted == [victim]
    assert not step_plan.admissions


def test_lower_class_makes_way_when_a_higher_one_does_not_fit() -> None:
    scene = Scene(max_num_seqs=3)
    scene.run(2, priority=1)
    youngest = scene.run(2, priority=1)
    scene.run(2, priority=2)
    high = scene.wait(2, priority=2)
    step_plan = scene.plan()
    assert step_plan.preempted == [youngest]  # one for each plan
    assert not step_plan.admissions
    scene.apply(step_plan)
    scene.execute()
    assert admitted(scene.plan()) == [high]


@pytest.mark.parametrize("priority", [2, 3])
def test_nobody_makes_way_for_the_same_class_or_a_lower_one(priority: int) -> None:
    scene = Scene(max_num_seqs=1)
    scene.run(2, priority=priority)
    scene.wait(2, priority=2)
    assert not scene.plan().preempted


def test_nobody_makes_way_when_an_ended_ones_blocks_are_on_their_way() -> None:
    scene = Scene(num_blocks=8)
    scene.run(4, priority=1)
    ending = scene.run(15)
    scene.decode(ending)
    scene.finish(ending)
    scene.wait(16, priority=3)
    assert not scene.plan().preempted
    scene.execute()
    assert scene.plan().admissions


@pytest.mark.parametrize("same_plan", [True, False], ids=["same plan", "earlier plan"])
def test_prefix_in_flight_is_waited_for_rather_than_computed_twice(same_plan: bool) -> None:
    scene, prompt = Scene(), [5] * 10
    first = scene.wait(prompt)
    if not same_plan:
        scene.apply(scene.plan(budget=4))
        scene.execute()
    second, other = scene.wait([*prompt, 6]), scene.wait(3)
    step_plan = scene.plan(budget=5)
    missing = second.block_hashes[0 if same_plan else 1]
    if same_plan:
        assert admitted(step_plan) == [first]
        step_plan = scene.plan(budget=20)
        assert admitted(step_plan) == [first, other]  # it holds up nobody
    else:
        assert row_counts(step_plan) == [(first, 5)]
        step_plan = scene.plan(budget=20)
        assert admitted(step_plan) == [other]
    assert step_plan.deferred == [(second, missing)]


def test_deferred_starts_behind_the_prefix_when_its_step_is_planned() -> None:
    scene = Scene()
    first, second = scene.wait([5] * 10), scene.wait([5] * 11)
    step_plan = scene.plan()
    for sequence, missing in step_plan.deferred:
        sequence.waits_for = missing
    scene.apply(step_plan)
    (admission,) = scene.plan().admissions  # the prefix is still in flight: steps run in order
    assert admission.sequence is second
    assert admission.start.shared == first.placement.block_ids[:2]
    assert (admission.start.num_computed, admission.num_tokens) == (8, 3)


def test_deferred_is_not_looked_at_when_its_block_is_still_to_come() -> None:
    scene = Scene()
    scene.run([5] * 12, planned=4)
    second = scene.wait([5] * 12)
    second.waits_for = second.block_hashes[1]
    assert not scene.plan().deferred
    second.waits_for = None
    assert scene.plan().deferred == [(second, second.block_hashes[1])]


@pytest.mark.parametrize("domain", ["tenant", "other"])
def test_same_prompt_is_computed_twice_when_the_domains_differ(domain: str) -> None:
    scene = Scene()
    first, second = scene.wait([5] * 10), scene.wait([5] * 10, domain=domain)
    expected = [first, second] if domain == "other" else [first]
    assert admitted(scene.plan()) == expected


def test_same_prompts_run_at_once_when_there_is_no_prefix_cache() -> None:
    scene = Scene(caching=False)
    both = [scene.wait([5] * 10), scene.wait([5] * 10)]
    assert admitted(scene.plan()) == both


def test_cached_blocks_are_spent_once_when_two_sequences_share_them() -> None:
    scene = Scene(num_blocks=8)
    scene.finish(scene.run([5] * 8))
    first, second = scene.wait([*[5] * 8, 6]), scene.wait([*[5] * 8, 7])
    step_plan = scene.plan()
    assert admitted(step_plan) == [first, second]
    assert step_plan.admissions[0].start.shared == step_plan.admissions[1].start.shared
    scene.apply(step_plan)
    assert scene.ledger.pool.num_used == 4
    # Held, they can't be evicted for a third one any more.
    scene.wait(12)
    assert not scene.plan().admissions


def test_choices_follow_when_their_leaders_prompt_is_planned() -> None:
    scene = Scene()
    leader = scene.wait(10, n=3)
    forks = leader.request.sequences[1:]
    assert admitted(scene.plan()) == [leader]
    scene.apply(scene.plan(budget=6))
    assert not scene.plan(budget=3).admissions  # a part of the prompt is missing
    scene.apply(scene.plan(budget=4))
    step_plan = scene.plan()
    assert admitted(step_plan) == forks
    for admission in step_plan.admissions:
        assert (admission.start.num_computed, admission.num_tokens) == (9, 1)
        assert admission.start.leader is leader.placement


def test_preempted_is_not_admitted_when_its_tokens_are_still_in_flight() -> None:
    scene = Scene()
    sequence = scene.run(3)
    scene.decode(sequence)
    scene.ledger.retire(sequence.placement)
    scene.queue.push(sequence, 4)
    assert not scene.plan().admissions
    scene.execute()
    assert admitted(scene.plan()) == [sequence]


def test_suspect_runs_alone_when_no_step_is_in_flight() -> None:
    scene = Scene()
    scene.wait(3, priority=3)
    suspect = scene.wait(3)
    assert admitted(scene.plan(solo=suspect)) == [suspect]
    scene.run(3, in_flight=True)
    assert not scene.plan(solo=suspect).admissions


def test_plan_looks_at_so_many_candidates_and_no_more() -> None:
    scene = Scene()
    waiting = [scene.wait(2) for _ in range(3)]
    assert admitted(scene.plan(max_candidates=2)) == waiting[:2]


def test_waiting_is_out_of_memory_when_the_whole_pool_is_too_small() -> None:
    scene = Scene(num_blocks=4)
    hopeless, fitting = scene.wait(17), scene.wait(3)
    step_plan = scene.plan()
    assert step_plan.out_of_memory == [hopeless]
    assert admitted(step_plan) == [fitting]
    assert step_plan.frees_places


def test_one_goes_on_in_a_tail_and_the_next_copies_it_in_the_same_plan() -> None:
    scene = Scene()
    scene.finish(scene.run([5] * 6))
    both = [scene.wait([*[5] * 6, 7]), scene.wait([*[5] * 6, 8])]
    step_plan = scene.plan()
    assert admitted(step_plan) == both
    first, second = (admission.start for admission in step_plan.admissions)
    assert (second.copy_from, first.copy_from) == (first.tail, None)
    step = scene.apply(step_plan)
    tables = [place.block_ids for place in step.placed]
    assert tables[0][0] == tables[1][0]
    assert tables[0][1] != tables[1][1]
    assert [(move.source, move.destination) for move in step.copies] == [
        (tables[0][1], tables[1][1])
    ]


@pytest.mark.parametrize(("num_blocks", "num_computed"), [(3, 4), (4, 6)])
def test_part_is_computed_when_there_is_no_room_for_its_copy(
    num_blocks: int, num_computed: int
) -> None:
    scene = Scene(num_blocks=num_blocks)
    scene.finish(scene.run([5] * 8))
    scene.wait([*[5] * 6, 7, 7, 7])
    (admission,) = scene.plan().admissions
    assert admission.start.num_computed == num_computed
    scene.apply(scene.plan())
    scene.ledger.check_integrity()


def test_only_block_is_written_anew_when_a_part_of_it_is_known() -> None:
    scene = Scene(num_blocks=1)
    scene.finish(scene.run([5] * 4))
    scene.wait([5] * 2)
    (admission,) = scene.plan().admissions
    assert (admission.start.num_computed, admission.num_tokens) == (0, 2)
    scene.apply(scene.plan())


def test_plan_says_what_the_next_in_line_lacked() -> None:
    slots = Scene(max_num_seqs=2)
    slots.run(2)
    slots.wait(2)
    slots.wait(2)
    assert slots.plan().shortage is Shortage.SLOTS
    blocks = Scene(num_blocks=8)
    blocks.run(4)
    blocks.wait(28)
    assert blocks.plan().shortage is Shortage.KV_BLOCKS
    tokens = Scene()
    tokens.wait(6)
    tokens.wait(6)
    assert tokens.plan(budget=6).shortage is Shortage.TOKENS


def test_plan_lacks_nothing_when_all_who_wait_are_admitted() -> None:
    scene = Scene()
    scene.wait(6)
    scene.wait(3)
    assert scene.plan(budget=9).shortage is None
