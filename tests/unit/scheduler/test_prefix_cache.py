"""PrefixCache over a real BlockPool: what a match returns is what the hash says."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from infermesh.block_hash import BlockHash, extend_hashes, scope_hash
from services.scheduler.block_tree import num_common
from services.scheduler.blocks import BlockPool
from services.scheduler.ids import BlockId, StepId
from services.scheduler.prefix_cache import Match, Part, PrefixCache
from tests.randomised import machine_tests

SIZE = 3
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

    def parent(self, index: int) -> BlockHash:
        return hashes_of(self.domain, self.tokens)[index - 1] if index else scope_hash(self.domain)

    def block(self, index: int) -> list[int]:
        return self.tokens[index * SIZE : (index + 1) * SIZE]


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
        self.look_for_part(domain, tokens, num_known)
        return match

    def look_for_part(self, domain: str, tokens: list[int], num_full: int) -> Part | None:
        """What comes behind a match, compared with every block that is worth keeping."""
        before, rest = tuple(tokens[: num_full * SIZE]), tokens[num_full * SIZE :]
        parent = hashes_of(domain, tokens)[num_full - 1] if num_full else scope_hash(domain)
        part = self.cache.find_part(parent, rest)
        common = {
            block_id: num_common(held[len(before) :], rest)
            for block_id in self.pool.kept_blocks()
            for owner, held in [self.memory[block_id]]
            if owner == domain
            and held[: len(before)] == before
            and len(before) < len(held) <= len(before) + SIZE
        }
        best = max(common.values(), default=0)
        assert (part.num_tokens if part else 0) == best, "a longer part was missed, or made up"
        if part is not None:
            assert common[part.block_id] == best, "the block does not begin with these tokens"
            is_full = self.published.get(self.memory[part.block_id]) == part.block_id
            ends = len(self.memory[part.block_id][1]) == len(before) + best
            is_idle = self.pool.is_cached(part.block_id)
            assert part.is_idle_tail is (is_idle and ends and not is_full)
        return part

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
        taken = self.pool.allocate(count)
        evicted = [block_id for block_id in self.idle if not self.pool.is_cached(block_id)]
        assert len(evicted) == num_evicted
        self.idle = [block_id for block_id in self.idle if block_id not in evicted]
        for block_id in evicted:
            self.published.pop(self.memory[block_id], None)
            owner, held = self.memory[block_id]
            for other, longer in map(self.memory.__getitem__, self.idle):
                is_built_on = owner == other and held == longer[: len(held)]
                is_next = len(held) < len(longer) <= len(held) + SIZE and len(held) % SIZE == 0
                assert not (is_built_on and is_next), "what was built on a prefix outlives it"
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
        parent, token_ids = reader.parent(index), reader.block(index)
        is_new = self.cache.publish(block_hash, block_id, parent, token_ids)
        assert is_new is (key not in self.published)
        self.published.setdefault(key, block_id)
        reader.num_filled += 1
        self.forget_dropped()

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.give_back(self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1))))

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), count=st.integers(1, SIZE - 1))
    def end_within_a_block(self, data: st.DataObject, count: int) -> None:
        reader = self.readers[data.draw(st.integers(0, len(self.readers) - 1))]
        index = reader.num_filled
        if index == len(reader.block_ids):
            return
        domain, tokens = reader.domain, reader.tokens[: index * SIZE + count]
        block_id, parent = reader.block_ids[index], reader.parent(index)
        if index and not self.cache.is_published(parent):
            return
        self.memory[block_id] = domain, tuple(tokens)
        self.cache.keep_tail(block_id, parent, reader.block(index)[:count], count / SIZE)
        self.forget_dropped()
        self.readers.remove(reader)
        self.give_back(reader)
        part = self.look_for_part(domain, tokens, index)
        assert part is not None
        assert part.num_tokens == count

    @precondition(lambda self: self.idle)
    @rule(data=st.data(), words=st.lists(st.integers(0, 1), min_size=SIZE, max_size=SIZE))
    def go_on_in_a_tail(self, data: st.DataObject, words: list[int]) -> None:
        tails = [b for b in self.idle if len(self.memory[b][1]) % SIZE]
        if not tails:
            return
        tail = data.draw(st.sampled_from(tails))
        domain, held = self.memory[tail]
        index, tokens = len(held) // SIZE, [*held, *words][: (len(held) // SIZE + 1) * SIZE]
        shared = self.look_up(domain, tokens).block_ids
        if len(shared) == index:
            self.pool.hold([*shared, tail])
            self.idle = [b for b in self.idle if b not in shared and b != tail]
            self.readers.append(Reader(domain, tokens, [*shared, tail], index))

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

    def forget_dropped(self) -> None:
        """Tails of which another block holds as much now."""
        self.idle = [block_id for block_id in self.idle if block_id in self.pool.kept_blocks()]

    def give_back(self, reader: Reader) -> None:
        self.pool.release(reader.block_ids, NOW)
        held = {block_id for other in self.readers for block_id in other.block_ids}
        worth_keeping = self.pool.kept_blocks()
        for block_id in reversed(reader.block_ids):
            if block_id not in held and block_id in worth_keeping:
                self.idle.append(block_id)

    @invariant()
    def books_balance(self) -> None:
        self.cache.check_integrity()
        self.pool.check_integrity(b for reader in self.readers for b in reader.block_ids)
        assert len(self.cache) == len(self.published)
        assert self.pool.num_cached == len(self.idle)
        assert set(self.published.values()) <= self.pool.kept_blocks()


TestPrefixCache, TestPrefixCacheAtLength = machine_tests(PrefixCacheMachine, 20, 60, num_steps=40)


def put(cache: PrefixCache, block_ids: list[BlockId], tokens: list[int]) -> list[BlockHash]:
    """Full blocks of tokens, published in these blocks; their hashes."""
    hashes = hashes_of("a", tokens)
    for index, block_id in enumerate(block_ids):
        parent = hashes[index - 1] if index else scope_hash("a")
        cache.publish(hashes[index], block_id, parent, tokens[index * SIZE : (index + 1) * SIZE])
    return hashes


def test_match_is_cut_when_it_may_not_be_longer() -> None:
    pool = BlockPool(3)
    cache, blocks = PrefixCache(pool), pool.allocate(3)
    hashes = put(cache, blocks, [1] * 3 * SIZE)
    assert cache.match(hashes, 2) == Match(blocks[:2], None)


def test_block_stays_what_it_was_when_another_one_holds_the_same_tokens() -> None:
    pool = BlockPool(2)
    cache = PrefixCache(pool)
    first, second = pool.allocate(2)
    (block_hash,) = put(cache, [first], [1] * SIZE)
    assert not cache.publish(block_hash, second, scope_hash("a"), [1] * SIZE)
    pool.release([second], NOW)
    assert (pool.num_free, cache.match([block_hash], 1).block_ids) == (1, [first])


def test_hash_is_awaited_until_it_is_published_or_given_up() -> None:
    pool = BlockPool(2)
    cache = PrefixCache(pool)
    first, second = hashes_of("a", [1] * 2 * SIZE)
    cache.start_filling([first, second], priority=2)
    put(cache, pool.allocate(1), [1] * SIZE)
    assert set(cache.filling) == {second}
    cache.stop_filling([second])
    assert not cache.filling


def test_cache_knows_nothing_when_it_is_disabled() -> None:
    pool = BlockPool(2)
    cache = PrefixCache(pool, enabled=False)
    (block_hash,), (block_id, tail) = hashes_of("a", [1] * SIZE), pool.allocate(2)
    cache.start_filling([block_hash], priority=2)
    assert not cache.filling
    assert not cache.publish(block_hash, block_id, scope_hash("a"), [1] * SIZE)
    cache.keep_tail(tail, scope_hash("a"), [1], 1 / SIZE)
    pool.release([block_id, tail], NOW)
    assert (pool.num_free, len(cache)) == (2, 0)
