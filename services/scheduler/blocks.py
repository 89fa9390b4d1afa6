"""Who holds which KV block: reference counts, the free list, and what may be evicted.

Knows nothing of tokens or hashes: `PrefixCache` says which blocks are worth keeping, and hears when
one is taken away, which `Eviction` chooses. A block is free (nobody's), cached (nobody's, contents
kept) or used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from services.scheduler.eviction import Eviction
from services.scheduler.ids import BlockId, StepId


class _Release(NamedTuple):
    """Blocks whose holder is gone, and the last step that touches them."""

    after: StepId
    block_ids: list[BlockId]
    turn: int


class BlockPool:
    """free + used + cached = total, always."""

    def __init__(self, num_blocks: int, eviction: Eviction | None = None) -> None:
        self._eviction = eviction or Eviction()
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._free: deque[BlockId] = deque(BlockId(i) for i in range(num_blocks))
        # Oldest first; a dict because it is an ordered set.
        self._cached: dict[BlockId, None] = {}
        self._kept: set[BlockId] = set()
        # What of it is filled, where that is not all.
        self._shares: dict[BlockId, float] = {}
        self._quarantine: deque[_Release] = deque()
        self._last_executed = StepId(0)
        self._on_evict: Callable[[BlockId], None] | None = None
        self._last_built_on: Callable[[BlockId], BlockId] | None = None
        # So far; the first is the clock of evictions.
        self.num_allocated = 0
        self.num_evicted = 0

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

    def cached_blocks(self) -> dict[BlockId, None]:
        """Those nobody holds whose contents are kept, the longest unused first; not a copy."""
        return self._cached

    def kept_blocks(self) -> set[BlockId]:
        """Those whose contents are worth keeping, held or not; not a copy."""
        return self._kept

    def num_exclusive(self, block_ids: Iterable[BlockId]) -> int:
        """How many of these would become available if one holder released them."""
        refs = self._refs
        return sum(1 for block_id in block_ids if refs[block_id] == 1)

    def on_evict(
        self,
        listener: Callable[[BlockId], None],
        last_built_on: Callable[[BlockId], BlockId] | None = None,
    ) -> None:
        """`listener` hears of each kept block whose contents are given up.

        `last_built_on` may name another cached block that has to go before a chosen one.
        """
        self._on_evict, self._last_built_on = listener, last_built_on

    def allocate(self, count: int) -> list[BlockId]:
        """Takes `count` blocks for one holder; evicts the least valuable cached ones if it must."""
        if count > self.num_available:
            raise ValueError(f"{count} blocks wanted, {self.num_available} available")
        taken: list[BlockId] = []
        self.num_allocated += count
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
                self._eviction.reused(block_id)
            self._refs[block_id] += 1

    def release(self, block_ids: Sequence[BlockId], after: StepId, turn: int = 0) -> None:
        """One holder less, once step `after` (the last that touches them) has run.

        `turn`: how many answers the holder had gone on from.
        """
        if not block_ids:
            return
        entry = _Release(after, list(block_ids), turn)
        if after > self._last_executed:
            self._quarantine.append(entry)
        else:
            self._release_now(entry)

    def step_executed(self, step_id: StepId) -> None:
        """All steps up to `step_id` are over: what waited for them is released."""
        self._last_executed = step_id
        if not self._quarantine:
            return
        waiting: deque[_Release] = deque()
        for entry in self._quarantine:
            if entry.after <= step_id:
                self._release_now(entry)
            else:
                waiting.append(entry)
        self._quarantine = waiting

    def restart_steps(self) -> None:
        """The steps in flight are gone with their epoch; the next one counts from 1 again."""
        for entry in self._quarantine:
            self._release_now(entry)
        self._quarantine.clear()
        self._last_executed = StepId(0)

    def keep(self, block_id: BlockId, share: float = 1.0) -> None:
        """The contents, which fill this share of it, are worth keeping without a holder."""
        self._kept.add(block_id)
        if share < 1:
            self._shares[block_id] = share
        else:
            self._shares.pop(block_id, None)

    def drop(self, block_id: BlockId) -> None:
        """The contents are worth nothing any more."""
        self._kept.discard(block_id)
        self._shares.pop(block_id, None)
        self._eviction.forget(block_id)
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
        assert sorted(self._eviction) == sorted(cached), "a cached block can't be evicted"
        assert self._shares.keys() <= self._kept, "a block that holds nothing is filled in part"
        idle = {BlockId(i) for i, refs in enumerate(self._refs) if refs == 0}
        assert idle == free | cached, "a block without holder is neither free nor cached"
        assert self.num_free + self.num_used + self.num_cached == self.num_blocks
        if held is not None:
            counts = [0] * self.num_blocks
            for block_id in held:
                counts[block_id] += 1
            for entry in self._quarantine:
                for block_id in entry.block_ids:
                    counts[block_id] += 1
            assert counts == self._refs, "reference counts differ from what is held"

    def _release_now(self, entry: _Release) -> None:
        # Last block first: a prefix outlives what was built on it.
        for block_id in reversed(entry.block_ids):
            self._refs[block_id] -= 1
            if self._refs[block_id] == 0:
                if block_id in self._kept:
                    self._cached[block_id] = None
                    share = self._shares.get(block_id, 1.0)
                    self._eviction.idle(block_id, entry.turn, self.num_allocated, share)
                else:
                    self._free.append(block_id)

    def _evict(self) -> BlockId:
        block_id = self._eviction.victim(self.num_allocated)
        if self._last_built_on is not None:
            block_id = self._last_built_on(block_id)
        self._eviction.evict(block_id)
        self.num_evicted += 1
        del self._cached[block_id]
        self._kept.discard(block_id)
        self._shares.pop(block_id, None)
        if self._on_evict is not None:
            self._on_evict(block_id)
        return block_id
