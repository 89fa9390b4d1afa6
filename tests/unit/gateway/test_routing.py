"""Where a request goes: the choice by prefix, and the policies beside it."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.prompt_blocks import PromptBlocks
from gateway.request import ReplicaId
from gateway.routing import Candidate, choose_by_prefix, choose_in_turn
from infermesh.block_hash import BlockHash, extend_hashes, long_scope, scope_hash, shorten
from tests.unit.gateway.jobs import job

PROMPT = 1000


@st.composite
def fleets(draw: st.DrawFn) -> list[Candidate]:
    facts = st.tuples(
        st.integers(0, 3000), st.integers(0, 40), st.integers(0, PROMPT), st.floats(0, 1)
    )
    return [
        Candidate(
            ReplicaId(str(i)),
            num_tokens_waiting=waiting,
            num_requests=requests,
            num_tokens_matched=matched,
            compute_cost=PROMPT - matched,
            kv_usage=usage,
        )
        for i, (waiting, requests, matched, usage) in enumerate(
            draw(st.lists(facts, min_size=1, max_size=8))
        )
    ]


def chosen(candidates: list[Candidate], seed: int = 0) -> Candidate:
    found = choose_by_prefix(candidates, random.Random(seed).randrange)
    assert found is not None
    return found


@given(fleets(), st.integers(0, 2**32))
def test_choice_costs_no_more_than_the_sole_best_match_and_never_most(
    fleet: list[Candidate], seed: int
) -> None:
    one = chosen(fleet, seed)
    assert one in fleet
    costs = [candidate.cost for candidate in fleet]
    most = max(candidate.num_tokens_matched for candidate in fleet)
    holders = [candidate for candidate in fleet if candidate.num_tokens_matched == most]
    if len(holders) <= 2:  # all of them are looked at
        assert one.cost <= min(holder.cost for holder in holders)
    if len(fleet) > 1 and costs.count(max(costs)) == 1:
        assert one.cost < max(costs)


@given(fleets(), st.integers(0, 2**32))
def test_choice_is_the_cheapest_when_there_are_two(fleet: list[Candidate], seed: int) -> None:
    pair = fleet[:2]
    assert chosen(pair, seed).cost == min(one.cost for one in pair)


@given(st.integers(2, 8), st.integers(0, 2**32))
def test_no_replica_starves_when_all_are_equal(count: int, seed: int) -> None:
    fleet = [Candidate(ReplicaId(str(i))) for i in range(count)]
    draw = random.Random(seed)
    taken = {choose_by_prefix(fleet, draw.randrange) for _ in range(60 * count)}
    assert len(taken) == count


def facing(name: str, matched: int, **facts: float) -> Candidate:
    return Candidate(
        ReplicaId(name),
        num_tokens_matched=matched,
        compute_cost=PROMPT - matched,
        **facts,  # type: ignore[arg-type]
    )


def test_holder_wins_until_waiting_for_it_costs_more_than_computing() -> None:
    idle = facing("idle", 0)
    for waiting, name in ((0, "holder"), (1500, "holder"), (1700, "idle")):
        holder = facing("holder", 800, num_tokens_waiting=waiting)
        assert chosen([idle, holder]).replica_id == name


def test_of_two_that_hold_the_prefix_the_less_loaded_is_taken() -> None:
    busy, free = facing("busy", 800, num_requests=9), facing("free", 800, num_requests=1)
    assert chosen([busy, free]).replica_id == "free"


def test_new_prompt_goes_where_it_pushes_nothing_out() -> None:
    full, empty = facing("full", 16, kv_usage=1.0), facing("empty", 0)
    assert chosen([full, empty]).replica_id == "empty"


def test_nothing_is_chosen_among_nothing() -> None:
    assert choose_by_prefix([], lambda n: 0) is None
    assert choose_in_turn([], 3) is None


def test_replicas_take_turns() -> None:
    fleet = [Candidate(ReplicaId(str(i))) for i in range(3)]
    names = [choose_in_turn(fleet, turn) for turn in range(6)]
    assert names == [*fleet, *fleet]


@pytest.mark.parametrize(
    ("switch_len", "is_long"), [(0, False), (39, True), (40, False), (100, False)]
)
def test_prompt_is_hashed_as_the_scheduler_that_gets_it_will(
    switch_len: int, is_long: bool
) -> None:
    prompt = PromptBlocks(
        job(
            prompt_token_ids=tuple(range(40)),
            sharing_domain="acme/al",
            rope_switch_len=switch_len,
        )
    )
    scope = scope_hash("acme/al")
    by_hand: list[BlockHash] = []
    extend_hashes(by_hand, long_scope(scope) if is_long else scope, list(range(40)), 16)
    assert prompt.num_tokens == 40
    assert list(prompt.of(16)) == list(shorten(by_hand))
    assert len(by_hand) == 2
    assert prompt.of(0) == ()
    assert len(prompt.of(8)) == 5
