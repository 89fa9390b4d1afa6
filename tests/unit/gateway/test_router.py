"""When prompts are hashed, and where; who is told of a choice."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

from gateway.prefix_index import PrefixIndex
from gateway.prompt_blocks import PromptBlocks
from gateway.replica.client import ReplicaClient
from gateway.request import ReplicaId
from gateway.router import Router
from gateway.routing import Candidate, Policy
from infermesh.block_hash import ShortHash
from tests.unit.gateway.jobs import job


class Prompt(PromptBlocks):
    """Notes the thread of each hashing."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(job(prompt_token_ids=tuple(range(num_tokens))))
        self.threads: list[threading.Thread] = []

    def of(self, block_size: int) -> Sequence[ShortHash]:
        self.threads.append(threading.current_thread())
        return super().of(block_size)


class Replica:
    """As much of a client as the router uses."""

    def __init__(self, name: str, block_size: int = 16) -> None:
        self.name = name
        self.prefixes = PrefixIndex(lambda: 0.0)
        self.prefixes.block_size = block_size
        self.num_tokens = 0

    def candidate(self, blocks: Sequence[ShortHash] = (), costs: Sequence[float] = (0,)) -> Any:
        matched = self.prefixes.num_matched(blocks)
        return Candidate(
            ReplicaId(self.name),
            num_tokens_submitted=self.num_tokens,
            num_tokens_matched=matched * self.prefixes.block_size,
            compute_cost=costs[matched],
        )

    def note_tokens(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens


@pytest.fixture
def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1)


def router(threads: ThreadPoolExecutor, policy: Policy = Policy.PREFIX) -> Router:
    return Router(policy, threads)


def clients(*replicas: Replica) -> list[ReplicaClient]:
    return cast("list[ReplicaClient]", list(replicas))


@pytest.mark.parametrize("policy", Policy)
async def test_nothing_is_hashed_for_the_only_replica(
    threads: ThreadPoolExecutor, policy: Policy
) -> None:
    (only,), prompt, route = clients(Replica("a")), Prompt(10_000), router(threads, policy)
    await route.prepare([only], prompt)
    assert route.choose([only], prompt) is only
    assert prompt.threads == []


async def test_only_long_prompts_are_hashed_in_a_thread(threads: ThreadPoolExecutor) -> None:
    pair = clients(Replica("a"), Replica("b", block_size=32))
    short, long = Prompt(1_000), Prompt(10_000)
    await router(threads).prepare(pair, short)
    assert short.threads == []
    await router(threads).prepare(pair, long)
    assert len(long.threads) == 2  # one per block size
    assert threading.main_thread() not in long.threads


def test_only_tokens_that_must_be_computed_count_as_sent(threads: ThreadPoolExecutor) -> None:
    one, two = Replica("one"), Replica("two")
    route, prompt = router(threads), Prompt(100)
    first = cast(Replica, route.choose(clients(one, two), prompt))
    assert first.num_tokens == 100
    assert cast(Replica, route.choose(clients(one, two), prompt)) is first
    assert first.num_tokens == 100 + 100 % 16


def test_nobody_is_chosen_where_nobody_is_able(threads: ThreadPoolExecutor) -> None:
    for policy in Policy:
        assert router(threads, policy).choose([], Prompt(100)) is None


def test_replicas_that_cache_nothing_share_by_load(threads: ThreadPoolExecutor) -> None:
    one, two = Replica("one", block_size=0), Replica("two", block_size=0)
    route = router(threads)
    for _ in range(6):
        route.choose(clients(one, two), Prompt(100))
    assert one.num_tokens == two.num_tokens == 300
