"""Who holds which KV block: reference counts, the free list, and what may be evicted.

Knows nothing of tokens or hashes: `PrefixCache` says which blocks are worth keeping, and hears when
one is taken away. A block is free (nobody's), cached (nobody's, contents kept) or used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from services.scheduler.ids import BlockId, StepId


class BlockPool:
    """free + used + cached = total, always."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._free: deque[BlockId] = deque(BlockId(i) for i in range(num_blocks))
        # Oldest first; a dict because it is an ordered set.
        self._cached: dict[BlockId, None] = {}
        self._kept: set[BlockId] = set()
        self._quarantine: deque[tuple[StepId, list[BlockId]]] = deque()
        self._last_executed = StepId(0)
        self._on_evict: Callable[[BlockId], None] | None = None

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out now."""
        return len(self._free) + len(self._cached)

    @property
    def has_quarantine(self) -> bool:
        """Released blocks will come back when the steps in flight have run."""
        return bool(self._quarantine)

    def is_cached(self, block_id: BlockId) -> bool:
        return block_id in self._cached

    def num_exclusive(self, block_ids: Iterable[BlockId]) -> int:
        """How many of these would become available if one holder released them."""
        refs = self._refs
        return sum(1 for block_id in block_ids if refs[block_id] == 1)

    def on_evict(self, listener: Callable[[BlockId], None]) -> None:
        """`listener` hears of each kept block whose contents are given up."""
        self._on_evict = listener

    def allocate(self, count: int) -> list[BlockId]:
        """Takes `count` blocks for one holder; evicts the longest unused cached ones if it must."""
        if count > self.num_available:
            raise ValueError(f"{count} blocks wanted, {self.num_available} available")
        taken: list[BlockId] = []
        for _ in range(count):
            block_id = self._free.popleft() if self._free else self._evict()
            self._refs[block_id] = 1
            taken.append(block_id)
        return taken

    def hold(self, block_ids: Iterable[BlockId]) -> None:
        """One more holder for blocks that are used or cached."""
        for block_id in block_ids:
            if self._refs[block_id] == 0:
                del self._cached[block_id]
            self._refs[block_id] += 1

    def release(self, block_ids: Sequence[BlockId], after: StepId) -> None:
        """One holder less, once step `after` (the last that touches them) has run."""
        if not block_ids:
            return
        if after > self._last_executed:
            self._quarantine.append((after, list(block_ids)))
        else:
            self._release_now(block_ids)

    def step_executed(self, step_id: StepId) -> None:
        """All steps up to `step_id` are over: what waited for them is released."""
        self._last_executed = step_id
        if not self._quarantine:
            return
        waiting: deque[tuple[StepId, list[BlockId]]] = deque()
        for after, block_ids in self._quarantine:
            if after <= step_id:
                self._release_now(block_ids)
            else:
                waiting.append((after, block_ids))
        self._quarantine = waiting

    def restart_steps(self) -> None:
        """The steps in flight are gone with their epoch; the next one counts from 1 again."""
        for _, block_ids in self._quarantine:
            self._release_now(block_ids)
        self._quarantine.clear()
        self._last_executed = StepId(0)

    def keep(self, block_id: BlockId) -> None:
        """The contents are worth keeping when the last holder is gone."""
        self._kept.add(block_id)

    def drop(self, block_id: BlockId) -> None:
        """The contents are worth nothing any more."""
        self._kept.discard(block_id)
        if block_id in self._cached:
            del self._cached[block_id]
            self._free.append(block_id)

    def check_integrity(self, held: Iterable[BlockId] | None = None) -> None:
        """Raises AssertionError where the books do not balance; `held`: every holder's blocks."""
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert not free & cached, "a block is free and cached"
        assert cached <= self._kept, "a cached block is not worth keeping"
        assert not free & self._kept, "a free block is worth keeping"
        idle = {BlockId(i) for i, refs in enumerate(self._refs) if refs == 0}
        assert idle == free | cached, "a block without holder is neither free nor cached"
        assert self.num_free + self.num_used + self.num_cached == self.num_blocks
        if held is not None:
            counts = [0] * self.num_blocks
            for block_id in held:
                counts[block_id] += 1
            for _, block_ids in self._quarantine:
                for block_id in block_ids:
                    counts[block_id] += 1
            assert counts == self._refs, "reference counts differ from what is held"

    def _release_now(self, block_ids: Sequence[BlockId]) -> None:
        # Last block first: a prefix outlives what was built on it.
        for block_id in reversed(block_ids):
            self._refs[block_id] -= 1
            if self._refs[block_id] == 0:
                if block_id in self._kept:
                    self._cached[block_id] = None
                else:
                    self._free.append(block_id)

    def _evict(self) -> BlockId:
        block_id = next(iter(self._cached))
        del self._cached[block_id]
        self._kept.discard(block_id)
        if self._on_evict is not None:
            self._on_evict(block_id)
        return block_id
