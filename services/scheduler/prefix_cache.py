"""Which KV block holds which tokens, so that no prefix is computed twice.

Owns the map from hash (`infermesh/block_hash.py`) to block, a journal of its changes, and what each
kept block holds (`block_tree.py`); the blocks belong to `BlockPool`.

A hash is *published* when the step that fills its block is planned: later steps may read the block,
because steps run in order. It is *confirmed* when that step has run, and withdrawn if it failed.

A *tail* is the last block of a sequence that left, filled in part: it has no hash, and only what
has run is in it. Who begins with some of its tokens, or of a full block's, copies the block; who
begins with all of a tail that nobody holds goes on in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from infermesh.block_hash import BlockHash
from services.scheduler.block_tree import BlockTree
from services.scheduler.blocks import BlockPool
from services.scheduler.ids import BlockId

# Changes that a reader of the journal may be behind: seconds, at any rate a device computes.
JOURNAL_LENGTH = 1 << 14


class Match(NamedTuple):
    """The cached blocks that a sequence can start from, and the first hash that was missing."""

    block_ids: list[BlockId]
    missing: BlockHash | None


class Part(NamedTuple):
    """A block that holds the next `num_tokens` tokens of a sequence, and perhaps others."""

    block_id: BlockId
    num_tokens: int
    # Nobody holds it and it ends with them: it may be written on. Else it has to be copied.
    is_idle_tail: bool


class Changes(NamedTuple):
    """What is published now and was not before, and the reverse."""

    stored: list[BlockHash]
    removed: list[BlockHash]


class PrefixCache:
    """Hash to block and back. `filling` are hashes that a running sequence has yet to compute."""

    def __init__(self, pool: BlockPool, enabled: bool = True) -> None:
        self.enabled = enabled
        self._pool = pool
        self._by_hash: dict[BlockHash, BlockId] = {}
        self._hash_of: dict[BlockId, BlockHash] = {}  # of full ones
        self._tree = BlockTree()  # all that are kept
        self.filling: dict[BlockHash, int] = {}  # with the class of who computes it
        self._journal: deque[tuple[BlockHash, bool]] = deque(maxlen=JOURNAL_LENGTH)
        self._num_changes = 0
        pool.on_evict(self._forget, self._last_built_on)

    def __len__(self) -> int:
        return len(self._by_hash)

    @property
    def num_changes(self) -> int:
        """Published or forgotten hashes so far: where a reader of the journal is."""
        return self._num_changes

    def changes_since(self, num_seen: int) -> Changes | None:
        """What a reader who had seen `num_seen` changes missed; None where that is too much.

        Of a hash that came and went, the last word counts.
        """
        num_missed = self._num_changes - num_seen
        if num_missed > len(self._journal):
            return None
        last: dict[BlockHash, bool] = {}
        for block_hash, is_stored in islice(reversed(self._journal), num_missed):
            last.setdefault(block_hash, is_stored)
        stored = [block_hash for block_hash, is_stored in last.items() if is_stored]
        return Changes(stored, [one for one, is_stored in last.items() if not is_stored])

    def most_recently_used(self, limit: int) -> list[BlockHash]:
        """The published hashes: those in use, then by when their blocks were last in use."""
        cached = self._pool.cached_blocks()
        found = [h for block_id, h in self._hash_of.items() if block_id not in cached][:limit]
        full = (block_id for block_id in reversed(cached) if block_id in self._hash_of)
        for block_id in islice(full, limit - len(found)):
            found.append(self._hash_of[block_id])
        return found

    def match(self, hashes: Sequence[BlockHash], max_blocks: int) -> Match:
        """The longest published run of `hashes`, at most `max_blocks` of it."""
        block_ids: list[BlockId] = []
        by_hash = self._by_hash
        for block_hash in hashes[:max_blocks]:
            block_id = by_hash.get(block_hash)
            if block_id is None:
                return Match(block_ids, block_hash)
            block_ids.append(block_id)
        return Match(block_ids, None)

    def find_part(self, parent: BlockHash, token_ids: Sequence[int]) -> Part | None:
        """The block behind the prefix `parent` that begins with most of `token_ids`."""
        found = self._tree.longest(parent, token_ids)
        if found is None:
            return None
        block_id, count = found
        is_idle = self._pool.is_cached(block_id) and block_id not in self._hash_of
        return Part(block_id, count, is_idle and count == self._tree.num_tokens(block_id))

    def publish(
        self,
        block_hash: BlockHash,
        block_id: BlockId,
        parent: BlockHash,
        token_ids: Sequence[int],
        turn: int = 0,
    ) -> bool:
        """A block will hold these tokens, all of it, behind `parent`; `turn` answers are in them.

        False where another block holds the same already: one of them is enough.
        """
        self.filling.pop(block_hash, None)
        if not self.enabled:
            return False
        if block_hash in self._by_hash:
            if block_id not in self._hash_of:
                self.withdraw(block_id)  # it may have been a tail
            return False
        self._supersede(block_id, parent, token_ids)
        self._by_hash[block_hash] = block_id
        self._hash_of[block_id] = block_hash
        self._tree.put(block_id, parent, token_ids, turn)
        self._pool.keep(block_id)
        self._note(block_hash, True)
        return True

    def keep_tail(
        self,
        block_id: BlockId,
        parent: BlockHash,
        token_ids: Sequence[int],
        share: float,
        turn: int = 0,
    ) -> None:
        """A block holds these tokens, computed, and was not filled but for this share; `parent` is
        published or a scope. Another block that holds them too, and perhaps more, is enough.
        """
        if not self.enabled or block_id in self._hash_of:  # a step in flight fills it
            return
        if self._supersede(block_id, parent, token_ids):
            return
        self._tree.put(block_id, parent, token_ids, turn)
        self._pool.keep(block_id, share)

    def turn_of(self, block_id: BlockId) -> int:
        """How many answers of a chat are in a kept block and before it."""
        return self._tree.turn(block_id) if block_id in self._tree else 0

    def is_published(self, block_hash: BlockHash) -> bool:
        """Whether a block has it."""
        return block_hash in self._by_hash

    def withdraw(self, block_id: BlockId) -> None:
        """The contents are not there, as the step that was to fill it failed, or are not needed."""
        self._forget(block_id)
        self._pool.drop(block_id)

    def clear(self) -> None:
        """The device lost its memory."""
        for block_id in list(self._tree):
            self.withdraw(block_id)
        self.filling.clear()

    def start_filling(self, hashes: Iterable[BlockHash], priority: int) -> None:
        """A sequence will compute these: others who need them had better wait for it."""
        if self.enabled:
            self.filling.update(dict.fromkeys(hashes, priority))

    def stop_filling(self, hashes: Iterable[BlockHash]) -> None:
        """It will not, after all."""
        for block_hash in hashes:
            self.filling.pop(block_hash, None)

    def check_integrity(self) -> None:
        """Raises AssertionError where the two maps disagree."""
        assert {b: h for h, b in self._by_hash.items()} == self._hash_of, "the maps disagree"
        assert self._hash_of.keys() <= set(self._tree), "a full block's tokens are unknown"
        assert set(self._tree) == self._pool.kept_blocks(), "kept blocks are not known, or others"

    def _supersede(self, block_id: BlockId, parent: BlockHash, token_ids: Sequence[int]) -> bool:
        """Gives up the tail that `block_id` was, and another one of which it now holds all.

        True where another block holds all of these tokens, which makes `block_id` worthless.
        """
        if block_id in self._tree:
            self.withdraw(block_id)
        found = self._tree.longest(parent, token_ids)
        if found is None:
            return False
        if found.num_tokens == len(token_ids):
            return True
        if found.num_tokens == self._tree.num_tokens(found.block_id):
            self.withdraw(found.block_id)  # shorter than a block, so a tail
        return False

    def _last_built_on(self, block_id: BlockId) -> BlockId:
        """Down from a cached block, where others are cached that can't be found without it."""
        while (block_hash := self._hash_of.get(block_id)) is not None:
            below = (one for one in self._tree.below(block_hash) if self._pool.is_cached(one))
            child = next(below, None)
            if child is None:
                break
            block_id = child
        return block_id

    def _forget(self, block_id: BlockId) -> None:
        self._tree.remove(block_id)
        block_hash = self._hash_of.pop(block_id, None)
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._note(block_hash, False)

    def _note(self, block_hash: BlockHash, is_stored: bool) -> None:
        self._journal.append((block_hash, is_stored))
        self._num_changes += 1
