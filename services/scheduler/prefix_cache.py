"""Which KV block holds which tokens, so that no prefix is computed twice.

Owns the hash of a block and the map from hash to block; the blocks belong to `BlockPool`.

    block_hash[0] = SHA-256(scope, ids)         scope = SHA-256(sharing_domain, adapter, media),
                                                hashed again for long rotary tables
    block_hash[i] = SHA-256(block_hash[i-1], ids)     ids: little-endian int32, one full block

A hash is *published* when the step that fills its block is planned: later steps may read the block,
because steps run in order. It is *confirmed* when that step has run, and withdrawn if it failed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from services.scheduler.blocks import BlockPool
from services.scheduler.ids import BlockHash, BlockId


def scope_hash(sharing_domain: str, adapter: str = "", media: bytes = b"") -> BlockHash:
    """The parent of a sequence's first block: who may share it, and what else shaped it."""
    digest = hashlib.sha256()
    for part in (sharing_domain.encode(), adapter.encode(), media):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return BlockHash(digest.digest())


def long_scope(scope: BlockHash) -> BlockHash:
    """The scope of what was computed with the rotary tables for long sequences."""
    return BlockHash(hashlib.sha256(scope + b"long rope").digest())


def extend_hashes(
    hashes: list[BlockHash], scope: BlockHash, token_ids: Sequence[int], block_size: int
) -> None:
    """Appends to `hashes` until every full block of `token_ids` has one."""
    first, num_full = len(hashes), len(token_ids) // block_size
    if first >= num_full:
        return
    data = array("i", token_ids[first * block_size : num_full * block_size]).tobytes()
    width = 4 * block_size
    parent = hashes[-1] if hashes else scope
    for start in range(0, len(data), width):
        parent = BlockHash(hashlib.sha256(parent + data[start : start + width]).digest())
        hashes.append(parent)


class Match(NamedTuple):
    """The cached blocks that a sequence can start from, and the first hash that was missing."""

    block_ids: list[BlockId]
    missing: BlockHash | None


class PrefixCache:
    """Hash to block and back. `filling` are hashes that a running sequence has yet to compute."""

    def __init__(self, pool: BlockPool, enabled: bool = True) -> None:
        self.enabled = enabled
        self._pool = pool
        self._by_hash: dict[BlockHash, BlockId] = {}
        self._hash_of: dict[BlockId, BlockHash] = {}
        self.filling: set[BlockHash] = set()
        pool.on_evict(self._forget)

    def __len__(self) -> int:
        return len(self._by_hash)

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

    def publish(self, block_hash: BlockHash, block_id: BlockId) -> bool:
        """False where another block holds the same tokens already: one of them is enough."""
        self.filling.discard(block_hash)
        if not self.enabled or block_hash in self._by_hash:
            return False
        self._by_hash[block_hash] = block_id
        self._hash_of[block_id] = block_hash
        self._pool.keep(block_id)
        return True

    def withdraw(self, block_id: BlockId) -> None:
        """The step that was to fill the block did not run."""
        self._forget(block_id)
        self._pool.drop(block_id)

    def clear(self) -> None:
        """The device lost its memory."""
        for block_id in list(self._hash_of):
            self.withdraw(block_id)
        self.filling.clear()

    def start_filling(self, hashes: Iterable[BlockHash]) -> None:
        """A sequence will compute these: others who need them had better wait for it."""
        if self.enabled:
            self.filling.update(hashes)

    def stop_filling(self, hashes: Iterable[BlockHash]) -> None:
        """It will not, after all."""
        self.filling.difference_update(hashes)

    def check_integrity(self) -> None:
        """Raises AssertionError where the two maps disagree."""
        assert {b: h for h, b in self._by_hash.items()} == self._hash_of, "the maps disagree"

    def _forget(self, block_id: BlockId) -> None:
        block_hash = self._hash_of.pop(block_id, None)
        if block_hash is not None:
            del self._by_hash[block_hash]
