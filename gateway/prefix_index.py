"""Which blocks one replica holds: as it reported, and as what was just sent there will leave.

A hint for routing alone: a hash that is wrongly believed in costs a prefill, never a wrong token.
Fed from the replica's reports; the choice is `routing`'s.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from infermesh.block_hash import ShortHash

# Per replica; about 25 MB where it is reached. The longest known go first.
MAX_BLOCKS = 1 << 18
MAX_EXPECTED = 1 << 16
# A request computes its prompt, and the report of it arrives, within this, or it is forgotten.
EXPECTED_S = 10.0


@dataclass(frozen=True, slots=True)
class BlockEvents:
    """What a report says of the replica's prefix cache; of a snapshot, `stored` is everything.

    Attributes:
        block_size: tokens; 0 where it caches nothing.
    """

    sequence: int
    is_snapshot: bool
    stored: Sequence[ShortHash]
    removed: Sequence[ShortHash]
    block_size: int


class PrefixIndex:
    """One replica's blocks.

    Args:
        clock: monotonic seconds.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        max_blocks: int = MAX_BLOCKS,
        max_expected: int = MAX_EXPECTED,
    ) -> None:
        self._clock = clock
        self._max_blocks = max_blocks
        self._max_expected = max_expected
        # Ordered sets, the longest known first; of what is expected, until when.
        self._held: dict[ShortHash, None] = {}
        self._expected: dict[ShortHash, float] = {}
        self._sequence: int | None = None
        self.block_size = 0

    def __len__(self) -> int:
        return len(self._held)

    def apply(self, events: BlockEvents) -> bool:
        """Takes the next report. False: one before it was missed, and nothing is known until the
        snapshot that a new stream of reports begins with.
        """
        if events.is_snapshot:
            newest = list(events.stored[: self._max_blocks])
            self._held = dict.fromkeys(reversed(newest))
            self.block_size = events.block_size
            self._sequence = events.sequence
            return True
        if self._sequence is None or events.sequence != self._sequence + 1:
            self.clear()
            return False
        self._sequence = events.sequence
        for block_hash in events.removed:
            self._held.pop(block_hash, None)
        for block_hash in events.stored:
            self._held[block_hash] = None
            self._expected.pop(block_hash, None)
        while len(self._held) > self._max_blocks:
            del self._held[next(iter(self._held))]
        return True

    def clear(self) -> None:
        """The replica is gone, or a report of it was missed."""
        self._held.clear()
        self._expected.clear()
        self._sequence = None
        self.block_size = 0

    def expect(self, hashes: Sequence[ShortHash]) -> None:
        """A request with these blocks is on its way: whoever shares them had better follow it."""
        now = self._clock()
        for block_hash in hashes:
            if block_hash not in self._held:
                self._expected.pop(block_hash, None)  # to the end: they expire in order
                self._expected[block_hash] = now + EXPECTED_S
        while self._expected:
            oldest = next(iter(self._expected))
            if self._expected[oldest] > now and len(self._expected) <= self._max_expected:
                return
            del self._expected[oldest]

    def num_matched(self, hashes: Sequence[ShortHash]) -> int:
        """How many of them, from the first on, are held there or will be."""
        now, count = self._clock(), 0
        for block_hash in hashes:
            if block_hash not in self._held and self._expected.get(block_hash, now) <= now:
                break
            count += 1
        return count
