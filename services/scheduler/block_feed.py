"""What one watcher is told of the prefix cache: a snapshot first, then what changed since.

Reads the cache's journal when the watcher's next message is due, so that the step loop does nothing
per watcher. Blocks are told of when they are published: whoever is sent here then finds them, since
steps run in order; one whose step fails is told of as removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infermesh.block_hash import ShortHash, shorten
from services.scheduler.prefix_cache import PrefixCache
from services.scheduler.replica import Replica

# 1 MiB on the wire, and about 20 ms to gather. A larger cache tells of what was used last.
MAX_SNAPSHOT = 1 << 17


@dataclass(frozen=True, slots=True)
class BlockNews:
    """One message's share. Of a snapshot, `stored` is everything, what was used last first.

    Attributes:
        block_size: tokens; 0 where nothing is cached here.
    """

    sequence: int
    is_snapshot: bool
    stored: Sequence[ShortHash]
    removed: Sequence[ShortHash]
    block_size: int


class BlockFeed:
    """Where one watcher is."""

    def __init__(self, replica: Replica, max_snapshot: int = MAX_SNAPSHOT) -> None:
        self._replica = replica
        self._max_snapshot = max_snapshot
        self._sequence = 0
        self._cache: PrefixCache | None = None
        self._num_seen = 0

    def next(self) -> BlockNews | None:
        """What the watcher does not know yet; None where that is nothing."""
        batcher = self._replica.batcher
        if batcher is None:
            return self._news(True, [], [], 0) if self._sequence == 0 else None
        ledger = batcher.roster.ledger
        cache, old, num_seen = ledger.cache, self._cache, self._num_seen
        self._cache, self._num_seen = cache, cache.num_changes
        block_size = ledger.capacity.block_size if cache.enabled else 0
        # another cache: another model, or a device that has lost its memory
        changes = cache.changes_since(num_seen) if cache is old else None
        if changes is None:
            stored = cache.most_recently_used(self._max_snapshot)
            return self._news(True, shorten(stored), [], block_size)
        if not changes.stored and not changes.removed:
            return None
        return self._news(False, shorten(changes.stored), shorten(changes.removed), block_size)

    def _news(
        self,
        is_snapshot: bool,
        stored: Sequence[ShortHash],
        removed: Sequence[ShortHash],
        block_size: int,
    ) -> BlockNews:
        self._sequence += 1
        return BlockNews(self._sequence, is_snapshot, stored, removed, block_size)
