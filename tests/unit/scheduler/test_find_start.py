"""`find_start`: how much of a sequence need not be computed, from the cache or from a sibling."""

from __future__ import annotations

import pytest

from services.scheduler.plan import Start, find_start, leader_of
from services.scheduler.sequence import Sequence
from tests.unit.scheduler.scene import Scene

SIZE = 4


def start_of(scene: Scene, sequence: Sequence) -> Start:
    return find_start(sequence, scene.ledger.cache, SIZE)[0]


def cached(prompt: list[int]) -> Scene:
    """A scene in which the prompt was computed once, and nobody holds it any more."""
    scene = Scene(block_size=SIZE)
    scene.finish(scene.run(prompt))
    return scene


@pytest.mark.parametrize(
    ("length", "num_computed"),
    [(1, 0), (2, 1), (4, 3), (5, 4), (8, 7), (9, 8), (11, 10), (12, 11), (13, 12), (20, 12)],
)
def test_start_is_behind_what_is_cached_and_before_the_last_token(
    length: int, num_computed: int
) -> None:
    scene = cached([5] * 12)
    blocks = scene.ledger.cache.match(scene.arrive([5] * 12).sequences[0].block_hashes, 3).block_ids
    start = start_of(scene, scene.wait([5] * length))
    full, rest = divmod(num_computed, SIZE)
    assert start.num_computed == num_computed
    assert start.shared == blocks[:full]
    assert all(map(scene.ledger.pool.is_cached, start.touched))
    assert start.copy_from == (blocks[full] if rest else None)
    assert start.num_from_part(SIZE) == rest
    assert (start.tail, start.leader) == (None, None)


def test_start_names_the_first_block_that_was_missing() -> None:
    scene = cached([5] * 8)
    sequence = scene.wait([*[5] * 8, *[6] * 8])
    assert find_start(sequence, scene.ledger.cache, SIZE)[1] == sequence.block_hashes[2]
    known = scene.wait([5] * 9)
    assert find_start(known, scene.ledger.cache, SIZE)[1] is None


@pytest.mark.parametrize(
    ("prompt", "domain", "num_computed"),
    [
        ([5] * 9, "tenant", 8),
        ([5] * 9, "other", 0),
        ([5] * 3, "other", 0),
        ([6, *[5] * 8], "tenant", 0),  # the second block follows another first one
        ([*[5] * 4, 6, *[5] * 4], "tenant", 4),
        ([*[5] * 6, 6, *[5] * 4], "tenant", 6),
    ],
)
def test_start_is_shared_as_far_as_domain_and_all_tokens_are_the_same(
    prompt: list[int], domain: str, num_computed: int
) -> None:
    scene = cached([5] * 8)
    assert start_of(scene, scene.wait(prompt, domain=domain)).num_computed == num_computed


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("prompt_len", [1, 2, 4, 5, 8, 9, 10])
def test_fork_starts_at_its_last_prompt_token_when_the_leader_is_there(
    prompt_len: int, caching: bool
) -> None:
    scene = Scene(block_size=SIZE, caching=caching)
    leader = scene.run(prompt_len, n=2)
    place = leader.placement
    start = start_of(scene, leader.request.sequences[1])
    full, rest = divmod(prompt_len - 1, SIZE)
    assert start.num_computed == prompt_len - 1
    assert start.shared == place.block_ids[:full]
    # One block, one writer: a partial block is copied, whole ones are shared.
    assert start.copy_from == (place.block_ids[full] if rest else None)
    if rest:
        assert start.leader is place


@pytest.mark.parametrize(("planned", "forks"), [(4, False), (8, False), (9, True), (10, True)])
def test_fork_starts_at_the_leader_only_when_the_prompt_is_planned_up_to_there(
    planned: int, forks: bool
) -> None:
    scene = Scene(block_size=SIZE, caching=False)
    leader = scene.run(10, planned=planned, n=2)
    start = start_of(scene, leader.request.sequences[1])
    assert (start.leader is leader.placement) is forks
    assert start.num_computed == (9 if forks else 0)


def test_fork_takes_the_cache_when_it_reaches_further_than_the_prompt() -> None:
    scene = Scene(block_size=SIZE)
    leader = scene.run(5, n=2)
    fork = leader.request.sequences[1]
    fork.token_ids += [7] * 8  # its output from before it was preempted
    scene.ledger.hash_blocks(fork)
    assert start_of(scene, fork).leader is None  # 4 from the cache, as many as from the leader
    blocks = scene.ledger.pool.allocate(2)
    for index, block_id in enumerate(blocks):
        parent, block_hash = fork.block_hashes[index : index + 2]
        scene.ledger.cache.publish(block_hash, block_id, parent, [7] * SIZE)
    start = start_of(scene, fork)
    assert (start.num_computed, start.shared[1:]) == (12, blocks)


def test_leader_is_the_choice_that_is_furthest() -> None:
    scene = Scene(block_size=SIZE)
    first, second, third = scene.arrive(10, n=3).sequences
    assert leader_of(third) is None
    scene.admit(first, planned=4)
    scene.execute()
    scene.admit(second, planned=8)
    assert leader_of(third) is second.placement


def test_single_choice_has_no_leader_when_it_runs_itself() -> None:
    assert leader_of(Scene().run(3)) is None


def test_tail_is_gone_on_in_when_nobody_holds_it_and_all_of_it_is_wanted() -> None:
    scene = cached([5] * 6)
    start = start_of(scene, scene.wait([*[5] * 6, 7, 7]))
    assert start.num_computed == 6
    assert (len(start.shared), start.copy_from) == (1, None)
    assert start.held == [*start.shared, start.tail]
    assert scene.ledger.pool.is_cached(start.tail)


def test_tail_is_copied_when_another_admission_has_claimed_it() -> None:
    scene = cached([5] * 6)
    sequence = scene.wait([*[5] * 6, 7, 7])
    first = start_of(scene, sequence)
    second, _ = find_start(sequence, scene.ledger.cache, SIZE, {first.tail})
    assert (second.num_computed, second.copy_from, second.tail) == (6, first.tail, None)


@pytest.mark.parametrize("num_wanted", [5, 6])
def test_tail_is_copied_when_not_all_of_it_is_wanted_or_somebody_holds_it(num_wanted: int) -> None:
    scene = cached([5] * 6)
    if num_wanted == 6:
        scene.admit(scene.arrive([*[5] * 6, 8]).sequences[0])  # goes on in it
    start = start_of(scene, scene.wait([*[5] * num_wanted, 7, 7]))
    assert (start.num_computed, start.tail) == (num_wanted, None)
    assert start.copy_from is not None


def test_part_is_the_longest_of_those_that_begin_alike() -> None:
    scene = Scene(block_size=SIZE)
    for third in ([6, 1], [6, 6, 1], [7, 7], [6]):
        scene.finish(scene.run([*[5] * 4, *third]))
    assert start_of(scene, scene.wait([*[5] * 4, 6, 6, 9, 9])).num_computed == 6
    assert start_of(scene, scene.wait([*[5] * 4, 7, 9, 9, 9])).num_computed == 5
    assert start_of(scene, scene.wait([*[5] * 4, 8, 8, 8])).num_computed == 4


def test_part_waits_for_nobody_but_relies_on_who_fills_it() -> None:
    scene = Scene(block_size=SIZE)
    writer = scene.run([5] * 8, in_flight=True)
    reader = scene.arrive([*[5] * 6, 7, 7]).sequences[0]
    step = scene.admit(reader)
    assert [copy.source for copy in step.copies] == [writer.placement.block_ids[1]]
    assert [on for on, _ in reader.placement.relies_on] == [writer.placement] * 2
