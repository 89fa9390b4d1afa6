"""Which idle block is given up next: the one whose keeping saves least compute for its memory.

    value = P(reused | turn) * share of the block that is filled / time since it was last in use

All blocks are of one size, so compute per byte is tokens per block. The first and the last factor
are hyperbolic caching (Blankstein et al., USENIX ATC 2017), with the chance of reuse learnt per
kind of content in place of a count per item: chats that have come back once come back more likely
than what was asked once (Wang et al., "KVCache Cache in the Wild", USENIX ATC 2025, arXiv
2506.02634). Within a turn the order is that of last use, so one class alone is plain LRU.

Knows blocks by number and time by a count; what blocks hold is `PrefixCache`'s.
"""

from __future__ import annotations

from collections.abc import Iterator

from services.scheduler.ids import BlockId

NUM_CLASSES = 4
# Outcomes after which older ones count half.
_HALF_LIFE = 4096


class Eviction:
    """The idle blocks, by how many answers their sequences had gone on from."""

    def __init__(self, num_classes: int = NUM_CLASSES) -> None:
        # Since when each is idle; the longest first.
        self._idle: list[dict[BlockId, int]] = [{} for _ in range(num_classes)]
        self._class_of: dict[BlockId, int] = {}
        self._share: dict[BlockId, float] = {}  # where it is not 1
        # Idle for the first time: what becomes of them is learnt from.
        self._fresh: set[BlockId] = set()
        self._num_reused = [1.0] * num_classes
        self._num_over = [1.0] * num_classes
        self._num_outcomes = 0

    def __iter__(self) -> Iterator[BlockId]:
        """The idle blocks."""
        for blocks in self._idle:
            yield from blocks

    def idle(self, block_id: BlockId, turn: int, now: int, share: float = 1.0) -> None:
        """Nobody holds it any more; its last holder was at this turn of a chat."""
        known = self._class_of.get(block_id)
        if known is None:
            self._fresh.add(block_id)
        # Not below its descendants', which are idle for longer: it goes after them.
        kind = max(known or 0, min(turn, len(self._idle) - 1))
        self._class_of[block_id] = kind
        self._idle[kind][block_id] = now
        if share < 1:
            self._share[block_id] = share

    def reused(self, block_id: BlockId) -> None:
        """Somebody holds it again."""
        self._leave(block_id)
        self._learn(block_id, True)

    def forget(self, block_id: BlockId) -> None:
        """It holds nothing any more that could be reused."""
        kind = self._class_of.get(block_id)
        if kind is not None:
            self._leave(block_id)
            del self._class_of[block_id]
            self._fresh.discard(block_id)

    def evict(self, block_id: BlockId) -> None:
        """It was given up."""
        self._learn(block_id, False)
        self.forget(block_id)

    def victim(self, now: int) -> BlockId:
        """The least valuable of those that are idle longest in their class; one must be idle."""
        return min(self._candidates(now))[1]

    def chance(self, kind: int) -> float:
        """The share of a class's blocks that were reused."""
        return self._num_reused[kind] / self._num_over[kind]

    def _candidates(self, now: int) -> Iterator[tuple[float, BlockId]]:
        chance = 0.0
        for kind, blocks in enumerate(self._idle):
            # Never less than a lower class's: a prefix must not go before what is built on it.
            chance = max(chance, self.chance(kind))
            if blocks:
                block_id, since = next(iter(blocks.items()))
                yield chance * self._share.get(block_id, 1.0) / (now - since + 1), block_id

    def _leave(self, block_id: BlockId) -> None:
        self._idle[self._class_of[block_id]].pop(block_id, None)
        self._share.pop(block_id, None)

    def _learn(self, block_id: BlockId, is_reused: bool) -> None:
        if block_id not in self._fresh:
            return
        self._fresh.discard(block_id)
        kind = self._class_of[block_id]
        self._num_reused[kind] += is_reused
        self._num_over[kind] += 1
        self._num_outcomes += 1
        if self._num_outcomes % _HALF_LIFE == 0:
            self._num_reused = [count / 2 for count in self._num_reused]
            self._num_over = [count / 2 for count in self._num_over]
