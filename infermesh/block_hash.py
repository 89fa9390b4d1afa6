"""The names of KV blocks: equal exactly where the tokens, and all before them, are equal.

Schedulers keep blocks under these hashes and gateways route by them, so both compute them here.

    block_hash[0] = SHA-256(scope, ids)         scope = SHA-256(sharing_domain, adapter, media),
                                                hashed again for long rotary tables
    block_hash[i] = SHA-256(block_hash[i-1], ids)     ids: little-endian int32, one full block
"""

import hashlib
import sys
from array import array
from collections.abc import Sequence
from typing import NewType, cast

# SHA-256 over a block's tokens, all tokens before it, and who may share them.
BlockHash = NewType("BlockHash", bytes)
# The first 8 bytes of one, little-endian, as reports of a prefix cache carry it: a hint, no proof.
ShortHash = NewType("ShortHash", int)


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
    ids = array("i", token_ids[first * block_size : num_full * block_size])
    if sys.byteorder == "big":
        ids.byteswap()
    data, width = ids.tobytes(), 4 * block_size
    parent = hashes[-1] if hashes else scope
    for start in range(0, len(data), width):
        parent = BlockHash(hashlib.sha256(parent + data[start : start + width]).digest())
        hashes.append(parent)


def shorten(hashes: Sequence[BlockHash]) -> list[ShortHash]:
    """What reports carry of these hashes; a million in a tenth of a second."""
    words = array("Q", b"".join(hashes))[::4]
    if sys.byteorder == "big":
        words.byteswap()
    return cast("list[ShortHash]", words.tolist())
