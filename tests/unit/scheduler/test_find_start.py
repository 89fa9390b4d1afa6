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
    [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8), (12, 8), (13, 12), (20, 12)],
)
def test_start_is_behind_the_cached_blocks_and_before_the_last_token(
    length: int, num_computed: int
) -> None:
    scene = cached([5] * 12)
    start = start_of(scene, scene.wait([5] * length))
    assert start.num_computed == num_computed
    assert len(start.shared) == num_computed // SIZE
    assert all(map(scene.ledger.pool.is_cached, start.shared))
    assert (start.copy_from, start.leader) == (None, None)


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
        ([6, *[5] * 8], "tenant", 0),  # the second block follows another first one
        ([*[5] * 4, 6, *[5] * 4], "tenant", 4),
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
    for block_hash, block_id in zip(fork.block_hashes[1:], blocks, strict=True):
        scene.ledger.cache.publish(block_hash, block_id)
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
