"""KV budgets and capacities, and what this host gives."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.shard.domain import LoadSpec
from services.shard.host import available_memory_bytes, num_threads, physical_cores
from services.shard.sizing import cpu_kv_budget, cuda_kv_budget, size

GIB = 1 << 30


@pytest.mark.parametrize(("available", "budget"), [(8 * GIB, 2 * GIB), (64 * GIB, 4 * GIB)])
def test_cpu_budget_is_a_quarter_and_at_most_four_gib_when_memory_grows(
    available: int, budget: int
) -> None:
    assert cpu_kv_budget(available) == budget


def test_cuda_budget_is_nine_tenths_less_what_is_used_when_weights_are_loaded() -> None:
    assert cuda_kv_budget(100 * GIB, 70 * GIB) == 60 * GIB
    assert cuda_kv_budget(100 * GIB, 5 * GIB) == 0


@given(available=st.integers(0, 1 << 40), shards=st.integers(1, 64))
def test_cpu_budgets_of_all_shards_are_no_more_than_one_takes_alone(
    available: int, shards: int
) -> None:
    assert shards * cpu_kv_budget(available, shards) <= cpu_kv_budget(available)


def test_cuda_budget_is_a_shards_part_when_the_others_have_not_claimed_theirs() -> None:
    # Two shards with 10 GiB of weights each; the other one is still loading.
    assert cuda_kv_budget(100 * GIB, 90 * GIB, 10 * GIB, local_shards=2) == 35 * GIB
    # The other one has claimed more than its part: what is left is all there is.
    assert cuda_kv_budget(100 * GIB, 30 * GIB, 10 * GIB, local_shards=2) == 20 * GIB
    assert cuda_kv_budget(100 * GIB, 90 * GIB, 60 * GIB, local_shards=2) == 0


@given(
    model_len=st.integers(1, 10_000),
    wanted_len=st.integers(0, 10_000),
    num_seqs=st.integers(1, 100),
    block_size=st.integers(1, 64),
    block_bytes=st.integers(1, 1000),
    budget=st.integers(1000, 10_000_000),
)
def test_size_stays_within_budget_and_need_when_nothing_is_asked_for(
    model_len: int, wanted_len: int, num_seqs: int, block_size: int, block_bytes: int, budget: int
) -> None:
    spec = LoadSpec("m", max_model_len=wanted_len, max_num_seqs=num_seqs, block_size=block_size)
    sized = size(spec, model_len=model_len, block_bytes=block_bytes, budget_bytes=budget)
    blocks = sized.capacity.num_blocks
    assert blocks * block_bytes <= budget
    longest = min(model_len, wanted_len or model_len)
    assert blocks <= num_seqs * -(-longest // block_size)
    assert 0 < sized.max_model_len <= min(longest, blocks * block_size)


def test_threads_grow_with_the_model_when_cores_allow() -> None:
    assert num_threads(20 << 20) == 1
    assert num_threads(1 << 40) == physical_cores()
    assert num_threads(1 << 40, local_shards=2) == max(1, physical_cores() // 2)


def test_host_gives_at_least_one_core_and_some_memory() -> None:
    assert 1 <= physical_cores() <= len(os.sched_getaffinity(0))
    assert available_memory_bytes() > 0
