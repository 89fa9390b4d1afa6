"""Which beginnings prompts have in common: a tree of their blocks, of the latest prompts alone.

What many different prompts begin with, a system prompt, is worth having on every replica; what one
conversation said is not. Without this, the first replica that holds a system prompt would attract
every conversation that begins with it, and its memory would hold a few of them while others idle.
"""

from collections.abc import Sequence

from infermesh.block_hash import ShortHash

# About 20 MB; the longest unused go first.
MAX_BLOCKS = 1 << 17


class PromptTree:
    """How many different prompts lead through each block: the leaves beyond it."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        # The longest unused first; a block is a hash of all before it, so it needs no parent.
        self._num_leaves: dict[ShortHash, int] = {}
        self._inner: set[ShortHash] = set()

    def __len__(self) -> int:
        return len(self._num_leaves)

    def num_leaves(self, block: ShortHash) -> int:
        """0 for a block that was not seen, or not of late."""
        return self._num_leaves.get(block, 0)

    def add(self, blocks: Sequence[ShortHash]) -> None:
        """A prompt that begins with these; one that goes on where another ended replaces it."""
        known = next((i for i, b in enumerate(blocks) if b not in self._num_leaves), len(blocks))
        branches = 0 < known < len(blocks) and blocks[known - 1] in self._inner
        for index in reversed(range(len(blocks))):  # a beginning outlives what follows it
            block = blocks[index]
            count = self._num_leaves.pop(block, 0)
            self._num_leaves[block] = count + (index >= known or branches)
        self._inner.update(blocks[:-1])
        while len(self._num_leaves) > self._max_blocks:
            oldest = next(iter(self._num_leaves))
            del self._num_leaves[oldest]
            self._inner.discard(oldest)

    def costs(
        self, blocks: Sequence[ShortHash], block_size: int, num_tokens: int, num_replicas: int
    ) -> list[float]:
        """What computing a prompt of `num_tokens` costs where its first i blocks are held, in
        tokens, for every i. A block that is worth having everywhere counts for its share of that:
        `num_replicas` computations, for as many prompts as lead through it.
        """
        cost = float(num_tokens - len(blocks) * block_size)
        found = [cost]
        for block in reversed(blocks):
            cost += block_size * min(1.0, num_replicas / max(1, self.num_leaves(block)))
            found.append(cost)
        found.reverse()
        return found
