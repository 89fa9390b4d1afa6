"""What watchers of a replica are told of its prefix cache adds up to what the cache holds."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from infermesh.block_hash import BlockHash, scope_hash, shorten
from services.scheduler.block_feed import BlockFeed
from services.scheduler.ids import BlockId, StepId
from services.scheduler.ledger import Capacity, Ledger
from services.scheduler.replica import Replica
from tests.randomised import machine_tests

NOW = StepId(0)
NUM_BLOCKS = 6
JOURNAL = 8


def named(number: int) -> BlockHash:
    return scope_hash(str(number))


def publish(ledger: Ledger, number: int, block_id: BlockId) -> None:
    ledger.cache.publish(named(number), block_id, named(-1), [number] * 16)


def device(caching: bool = True) -> Ledger:
    """A ledger whose journal is short."""
    ledger = Ledger(Capacity(NUM_BLOCKS, 16, 8, 64), caching)
    ledger.cache._journal = deque(maxlen=JOURNAL)
    return ledger


class Host:
    """As much of a replica as a feed looks at."""

    def __init__(self, ledger: Ledger | None) -> None:
        self.batcher: Any = None
        if ledger is not None:
            self.put(ledger)

    def put(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.batcher = SimpleNamespace(roster=SimpleNamespace(ledger=ledger))

    def feed(self, **options: int) -> BlockFeed:
        return BlockFeed(cast(Replica, self), **options)


class Watcher:
    """Folds the messages of one stream, as a gateway does."""

    def __init__(self, feed: BlockFeed) -> None:
        self.feed = feed
        self.held: set[int] | None = None
        self.sequence = 0
        self.num_snapshots = 0

    def read(self) -> None:
        news = self.feed.next()
        if news is None:
            assert self.held is not None, "the first message is a snapshot"
            return
        assert news.sequence == self.sequence + 1
        self.sequence += 1
        assert not set(news.stored) & set(news.removed)
        if news.is_snapshot:
            self.held = set(news.stored)
            self.num_snapshots += 1
            return
        assert self.held is not None, "the first message is a snapshot"
        assert news.stored or news.removed
        self.held = (self.held | set(news.stored)) - set(news.removed)


class FeedMachine(RuleBasedStateMachine):
    """Blocks come and go, devices die, watchers read now and then."""

    @initialize()
    def start(self) -> None:
        self.host = Host(device())
        self.held: list[BlockId] = []
        self.watchers: list[Watcher] = []

    @property
    def ledger(self) -> Ledger:
        return self.host.ledger

    @precondition(lambda self: self.ledger.pool.num_available)
    @rule(number=st.integers(0, 12))
    def publish(self, number: int) -> None:
        (block_id,) = self.ledger.pool.allocate(1)  # it may evict another
        publish(self.ledger, number, block_id)
        self.held.append(block_id)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), fails=st.booleans())
    def end(self, data: st.DataObject, fails: bool) -> None:
        block_id = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        if fails:
            self.ledger.cache.withdraw(block_id)
        self.ledger.pool.release([block_id], NOW)

    @rule()
    def device_dies(self) -> None:
        self.host.put(device())
        self.held.clear()

    @precondition(lambda self: len(self.watchers) < 3)
    @rule()
    def watch(self) -> None:
        self.watchers.append(Watcher(self.host.feed()))

    @precondition(lambda self: self.watchers)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        watcher = data.draw(st.sampled_from(self.watchers))
        watcher.read()
        assert watcher.held == set(shorten(list(self.ledger.cache._by_hash)))

    @invariant()
    def counts_are_right(self) -> None:
        self.ledger.cache.check_integrity()


TestFeed, TestFeedAtLength = machine_tests(FeedMachine, 25, 80, num_steps=50)


def fill(ledger: Ledger, numbers: range) -> list[BlockId]:
    taken = ledger.pool.allocate(len(numbers))
    for number, block_id in zip(numbers, taken, strict=True):
        publish(ledger, number, block_id)
    return taken


def short(*numbers: int) -> list[int]:
    return list(shorten([named(number) for number in numbers]))


def test_watcher_that_reads_too_late_gets_a_snapshot() -> None:
    host = Host(device())
    watcher = Watcher(host.feed())
    watcher.read()
    for number in range(JOURNAL):
        (block_id,) = fill(host.ledger, range(number, number + 1))
        host.ledger.cache.withdraw(block_id)
        host.ledger.pool.release([block_id], NOW)
    fill(host.ledger, range(20, 22))
    watcher.read()
    assert (watcher.num_snapshots, watcher.held) == (2, set(short(20, 21)))


def test_snapshot_has_what_was_used_last_when_it_can_not_have_all() -> None:
    host = Host(device())
    blocks = fill(host.ledger, range(5))
    for block_id in (blocks[3], blocks[1], blocks[4]):
        host.ledger.pool.release([block_id], NOW)
    news = host.feed(max_snapshot=4).next()
    assert news is not None
    assert list(news.stored) == short(0, 2, 4, 1)


def test_block_that_came_and_went_between_two_messages_is_told_of_once() -> None:
    host = Host(device())
    feed = host.feed()
    feed.next()
    (block_id,) = fill(host.ledger, range(1))
    host.ledger.cache.withdraw(block_id)
    host.ledger.pool.release([block_id], NOW)
    fill(host.ledger, range(1, 2))
    news = feed.next()
    assert news is not None
    assert (list(news.stored), list(news.removed)) == (short(1), short(0))


def test_replica_without_a_model_or_without_a_cache_has_nothing_to_tell() -> None:
    host = Host(None)
    feed = host.feed()
    first = feed.next()
    assert first is not None
    assert (first.is_snapshot, list(first.stored), first.block_size) == (True, [], 0)
    assert feed.next() is None
    host.put(device(caching=False))
    second = feed.next()
    assert second is not None
    assert (second.is_snapshot, second.block_size) == (True, 0)
    fill(host.ledger, range(2))
    assert feed.next() is None


def test_tail_is_not_told_of() -> None:
    host = Host(device())
    feed = host.feed()
    feed.next()
    full, tail = host.ledger.pool.allocate(2)
    publish(host.ledger, 1, full)
    host.ledger.cache.keep_tail(tail, named(1), [7, 7], share=0.125)
    host.ledger.pool.release([full, tail], NOW)
    assert host.ledger.pool.num_cached == 2
    for news in (feed.next(), host.feed().next()):
        assert news is not None
        assert (list(news.stored), list(news.removed)) == (short(1), [])
    host.ledger.cache.withdraw(tail)
    assert feed.next() is None
