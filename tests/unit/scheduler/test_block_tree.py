"""BlockTree against a search through all it was told."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from infermesh.block_hash import BlockHash, scope_hash
from services.scheduler.block_tree import BlockTree, num_common
from services.scheduler.ids import BlockId
from tests.randomised import machine_tests

PARENTS = [scope_hash("a"), scope_hash("b")]
parents = st.sampled_from(PARENTS)
blocks = st.integers(0, 7).map(BlockId)
texts = st.lists(st.integers(0, 2), max_size=4)


class TreeMachine(RuleBasedStateMachine):
    """Blocks of few kinds of tokens, so that many begin alike."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = BlockTree()
        self.held: dict[BlockId, tuple[BlockHash, list[int]]] = {}

    @rule(block_id=blocks, parent=parents, tokens=texts.filter(bool))
    def put(self, block_id: BlockId, parent: BlockHash, tokens: list[int]) -> None:
        self.tree.put(block_id, parent, tokens)
        self.held[block_id] = parent, tokens

    @rule(block_id=blocks)
    def remove(self, block_id: BlockId) -> None:
        self.tree.remove(block_id)
        self.held.pop(block_id, None)

    @rule(parent=parents, tokens=texts)
    def ask(self, parent: BlockHash, tokens: list[int]) -> None:
        common = {b: num_common(t, tokens) for b, (p, t) in self.held.items() if p == parent}
        best, found = max(common.values(), default=0), self.tree.longest(parent, tokens)
        assert (found.num_tokens if found else 0) == best
        if found is not None:
            assert common[found.block_id] == best

    @invariant()
    def all_is_known(self) -> None:
        assert set(self.tree) == set(self.held)
        assert len(self.tree) == len(self.held)
        for block_id, (_, tokens) in self.held.items():
            assert block_id in self.tree
            assert self.tree.num_tokens(block_id) == len(tokens)
        for parent in PARENTS:
            below = {b for b, (p, _) in self.held.items() if p == parent}
            assert set(self.tree.below(parent)) == below


TestTree, TestTreeAtLength = machine_tests(TreeMachine, 25, 80, num_steps=40)
