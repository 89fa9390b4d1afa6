"""The tree of prompts counts as a trie does, and prices blocks by who shares them."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from gateway.prompt_tree import PromptTree
from infermesh.block_hash import ShortHash

# Blocks are hashes of all that comes before them, so a path of letters stands for one.
paths = st.lists(st.sampled_from("ab"), max_size=5).map("".join)


def blocks(path: str) -> list[ShortHash]:
    return [ShortHash(hash(path[: i + 1])) for i in range(len(path))]


@given(st.lists(paths, max_size=25))
def test_every_block_counts_the_leaves_beyond_it(prompts: list[str]) -> None:
    tree = PromptTree()
    for prompt in prompts:
        tree.add(blocks(prompt))
    nodes = {path[: i + 1] for path in prompts for i in range(len(path))}
    leaves = {one for one in nodes if not any(o != one and o.startswith(one) for o in nodes)}
    assert len(tree) == len(nodes)
    for node in nodes:
        wanted = sum(leaf.startswith(node) for leaf in leaves)
        assert tree.num_leaves(blocks(node)[-1]) == wanted


@given(st.lists(paths, max_size=25), st.integers(1, 6))
def test_tree_never_grows_beyond_its_bound(prompts: list[str], bound: int) -> None:
    tree = PromptTree(bound)
    for prompt in prompts:
        tree.add(blocks(prompt))
        assert len(tree) <= bound
        assert tree._inner <= set(tree._num_leaves)


@given(paths, st.lists(paths, max_size=10), st.integers(1, 5))
def test_cost_falls_with_every_block_that_is_held(
    prompt: str, others: list[str], num_replicas: int
) -> None:
    tree = PromptTree()
    for other in others:
        tree.add(blocks(other))
    costs = tree.costs(blocks(prompt), 16, 16 * len(prompt) + 7, num_replicas)
    assert len(costs) == len(prompt) + 1
    assert costs[-1] == 7
    assert all(more > less for more, less in itertools.pairwise(costs))
    assert costs[0] <= 16 * len(prompt) + 7


def test_conversation_costs_its_tokens_and_a_system_prompt_its_share() -> None:
    tree = PromptTree()
    for letter in "abcdefgh":
        tree.add(blocks("S" + letter))
    for length in range(2, 5):
        tree.add(blocks("S" + "a" * length))
    assert tree.costs(blocks("Saaaa"), 16, 80, 2) == [68, 64, 48, 32, 16, 0]
