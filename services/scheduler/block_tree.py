"""Which kept block goes on from which prefix, and with what tokens: full blocks and partial ones.

Finds, below a prefix, the block that has most in common with the tokens that follow. Below each
prefix the blocks are sorted by their tokens, so that it is a neighbour of where those would stand.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from infermesh.block_hash import BlockHash
from services.scheduler.ids import BlockId

Tokens = array  # of C ints: a quarter of a list's memory, and compared in order


class Contents(NamedTuple):
    """What a block holds: tokens, behind the prefix that `parent` names."""

    parent: BlockHash
    token_ids: Tokens[int]
    # How many answers of a chat are in it and before it.
    turn: int


class Common(NamedTuple):
    """A block, and how many of its first tokens are those that were asked for."""

    block_id: BlockId
    num_tokens: int


class BlockTree:
    """The kept blocks, by the hash of the block before them, or by the scope of a first block."""

    def __init__(self) -> None:
        self._contents: dict[BlockId, Contents] = {}
        self._below: dict[BlockHash, list[tuple[Tokens[int], BlockId]]] = {}

    def __len__(self) -> int:
        return len(self._contents)

    def __iter__(self) -> Iterator[BlockId]:
        return iter(self._contents)

    def __contains__(self, block_id: BlockId) -> bool:
        return block_id in self._contents

    def put(
        self, block_id: BlockId, parent: BlockHash, token_ids: Sequence[int], turn: int = 0
    ) -> None:
        """The block holds this, and what it was known to hold before is forgotten."""
        self.remove(block_id)
        contents = self._contents[block_id] = Contents(parent, array("i", token_ids), turn)
        insort(self._below.setdefault(parent, []), (contents.token_ids, block_id))

    def remove(self, block_id: BlockId) -> None:
        """Forgets a block, where it was known."""
        contents = self._contents.pop(block_id, None)
        if contents is None:
            return
        siblings = self._below[contents.parent]
        del siblings[bisect_left(siblings, (contents.token_ids, block_id))]
        if not siblings:
            del self._below[contents.parent]

    def num_tokens(self, block_id: BlockId) -> int:
        """That a known block holds."""
        return len(self._contents[block_id].token_ids)

    def turn(self, block_id: BlockId) -> int:
        """Of a known block."""
        return self._contents[block_id].turn

    def below(self, parent: BlockHash) -> Iterator[BlockId]:
        """The blocks that go on from a prefix."""
        return (block_id for _, block_id in self._below.get(parent, ()))

    def longest(self, parent: BlockHash, token_ids: Sequence[int]) -> Common | None:
        """The block below `parent` that begins with most of `token_ids`; None where none begins
        with the first."""
        siblings = self._below.get(parent)
        if siblings is None or not token_ids:
            return None
        wanted = array("i", token_ids)
        place = bisect_left(siblings, (wanted, BlockId(-1)))
        best: Common | None = None
        for held, block_id in siblings[max(0, place - 1) : place + 1]:
            count = num_common(held, wanted)
            if count > (best.num_tokens if best else 0):
                best = Common(block_id, count)
        return best


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
