"""PrefixCache over a real BlockPool: what a match returns is what the hash says."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.scheduler.blocks import BlockPool
from services.scheduler.ids import BlockHash, BlockId, StepId
from services.scheduler.prefix_cache import Match, PrefixCache, extend_hashes, scope_hash

SIZE = 2
NOW = StepId(0)
# What a block holds: its sharing domain, and all tokens up to its end.
Contents = tuple[str, tuple[int, ...]]


def hashes_of(domain: str, tokens: list[int], block_size: int = SIZE) -> list[BlockHash]:
    hashes: list[BlockHash] = []
    extend_hashes(hashes, scope_hash(domain), tokens, block_size)
    return hashes


@dataclass
class Reader:
    """A sequence with blocks for all its tokens, computed up to `num_filled` blocks."""

    domain: str
    tokens: list[int]
    block_ids: list[BlockId]
    num_filled: int

    def contents(self, index: int) -> Contents:
        return self.domain, tuple(self.tokens[: (index + 1) * SIZE])


texts = st.lists(st.integers(0, 1), min_size=SIZE, max_size=4 * SIZE)
domains = st.sampled_from(["a", "b"])


class PrefixCacheMachine(RuleBasedStateMachine):
    """Sequences over two tokens and two domains, so that prefixes collide all the time."""

    @initialize(num_blocks=st.integers(2, 10))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache(self.pool)
        self.readers: list[Reader] = []
        self.memory: dict[BlockId, Contents] = {}
        self.published: dict[Contents, BlockId] = {}
        self.idle: list[BlockId] = []  # cached, longest unused first

    def look_up(self, domain: str, tokens: list[int]) -> Match:
        """A match, compared with what the memory holds."""
        hashes = hashes_of(domain, tokens)
        match = self.cache.match(hashes, len(hashes))
        keys = [(domain, tuple(tokens[: (i + 1) * SIZE])) for i in range(len(hashes))]
        for key, block_id in zip(keys, match.block_ids, strict=False):
            assert self.memory.get(block_id) == key, "the contents are not what the hash says"
        num_known = next((i for i, key in enumerate(keys) if key not in self.published), len(keys))
        assert len(match.block_ids) == num_known, "a published prefix was missed, or one made up"
        assert match.missing == (hashes[num_known] if num_known < len(hashes) else None)
        return match

    @rule(domain=domains, tokens=texts)
    def begin(self, domain: str, tokens: list[int]) -> None:
        shared = self.look_up(domain, tokens).block_ids
        count = len(tokens) // SIZE - len(shared)
        num_idle = sum(map(self.pool.is_cached, shared))
        if count > self.pool.num_available - num_idle:
            return
        self.pool.hold(shared)
        self.idle = [block_id for block_id in self.idle if block_id not in shared]
        num_evicted = max(0, count - self.pool.num_free)
        oldest, self.idle = self.idle[:num_evicted], self.idle[num_evicted:]
        self.published = {key: b for key, b in self.published.items() if b not in oldest}
        taken = self.pool.allocate(count)
        for block_id in taken:  # it will be overwritten, no matter when
            self.memory.pop(block_id, None)
        self.readers.append(Reader(domain, tokens, shared + taken, len(shared)))

    @rule(domain=domains, tokens=texts)
    def ask(self, domain: str, tokens: list[int]) -> None:
        self.look_up(domain, tokens)

    @precondition(lambda self: any(r.num_filled < len(r.block_ids) for r in self.readers))
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        unfilled = [i for i, r in enumerate(self.readers) if r.num_filled < len(r.block_ids)]
        reader = self.readers[data.draw(st.sampled_from(unfilled))]
        index, key = reader.num_filled, reader.contents(reader.num_filled)
        block_id = reader.block_ids[index]
        self.memory[block_id] = key
        block_hash = hashes_of(reader.domain, reader.tokens)[index]
        assert self.cache.publish(block_hash, block_id) is (key not in self.published)
        self.published.setdefault(key, block_id)
        reader.num_filled += 1

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.give_back(self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1))))

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.published)))
        block_id = self.published[key]
        self.memory.pop(block_id, None)
        self.cache.withdraw(block_id)
        del self.published[key]
        self.idle = [one for one in self.idle if one != block_id]

    @rule()
    def device_dies(self) -> None:
        self.cache.clear()
        self.memory.clear()
        self.published.clear()
        self.idle.clear()
        while self.readers:  # they compute it all again
            reader = self.readers.pop()
            self.pool.release(reader.block_ids, NOW)

    def give_back(self, reader: Reader) -> None:
        self.pool.release(reader.block_ids, NOW)
        held = {block_id for other in self.readers for block_id in other.block_ids}
        worth_keeping = set(self.published.values())
        for block_id in reversed(reader.block_ids):
            if block_id not in held and block_id in worth_keeping:
                self.idle.append(block_id)

    @invariant()
    def books_balance(self) -> None:
        self.cache.check_integrity()
        self.pool.check_integrity(b for reader in self.readers for b in reader.block_ids)
        assert len(self.cache) == len(self.published)
        assert self.pool.num_cached == len(self.idle)


PrefixCacheMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestPrefixCache = PrefixCacheMachine.TestCase


def test_block_hash_is_sha256_of_its_parent_and_its_little_endian_ids() -> None:
    first, second = hashes_of("tenant", [1, 2, 300, 70_000, 9])
    scope = scope_hash("tenant")
    assert first == hashlib.sha256(scope + struct.pack("<2i", 1, 2)).digest()
    assert second == hashlib.sha256(first + struct.pack("<2i", 300, 70_000)).digest()


def test_block_hashes_are_the_same_when_tokens_come_piece_by_piece() -> None:
    tokens, hashes = list(range(11)), list[BlockHash]()
    for length in range(12):
        extend_hashes(hashes, scope_hash("tenant"), tokens[:length], 4)
        assert len(hashes) == length // 4
    assert hashes == hashes_of("tenant", tokens, 4)


@pytest.mark.parametrize(
    "other",
    [("b", "", b""), ("a", "x", b""), ("a", "", b"x"), ("", "a", b""), ("ax", "", b"")],
)
def test_scope_differs_when_anything_that_shapes_a_block_does(
    other: tuple[str, str, bytes],
) -> None:
    assert scope_hash("a", "", b"") != scope_hash(*other)
    assert scope_hash("a", "x", b"") != scope_hash("ax", "", b"")


def test_match_is_cut_when_it_may_not_be_longer() -> None:
    pool = BlockPool(3)
    cache = PrefixCache(pool)
    hashes, blocks = hashes_of("a", [1] * 6), pool.allocate(3)
    for block_hash, block_id in zip(hashes, blocks, strict=True):
        cache.publish(block_hash, block_id)
    assert cache.match(hashes, 2) == Match(blocks[:2], None)


def test_block_stays_what_it_was_when_another_one_holds_the_same_tokens() -> None:
    pool = BlockPool(2)
    cache = PrefixCache(pool)
    (block_hash,), (first, second) = hashes_of("a", [1, 1]), pool.allocate(2)
    cache.publish(block_hash, first)
    assert not cache.publish(block_hash, second)
    pool.release([second], NOW)
    assert (pool.num_free, cache.match([block_hash], 1).block_ids) == (1, [first])


def test_hash_is_awaited_until_it_is_published_or_given_up() -> None:
    pool = BlockPool(2)
    cache = PrefixCache(pool)
    first, second = hashes_of("a", [1, 2, 3, 4])
    cache.start_filling([first, second])
    cache.publish(first, pool.allocate(1)[0])
    assert cache.filling == {second}
    cache.stop_filling([second])
    assert not cache.filling


def test_cache_knows_nothing_when_it_is_disabled() -> None:
    pool = BlockPool(1)
    cache = PrefixCache(pool, enabled=False)
    (block_hash,), blocks = hashes_of("a", [1, 2]), pool.allocate(1)
    cache.start_filling([block_hash])
    assert not cache.filling
    assert not cache.publish(block_hash, blocks[0])
    pool.release(blocks, NOW)
    assert (pool.num_free, len(cache)) == (1, 0)
