"""The store keeps absolute lives, its budget, and one entry per exact key."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.cache.domain import Answer, EntryId
from services.cache.store import Store
from tests.unit.cache.entries import entry, keys

MIB = 1 << 20


def test_find_gives_the_entry_until_its_time_is_over() -> None:
    store = Store(MIB)
    store.put(entry(1, created_s=0.0))
    assert store.find(keys("question 1").exact, 999.9) is not None
    assert store.find(keys("question 1").exact, 1000.0) is None
    assert [one.id for one in store.expire(1000.0)] == [1]
    assert len(store) == 0
    assert store.num_bytes == 0


def test_hits_do_not_lengthen_a_life() -> None:
    store = Store(MIB)
    store.put(entry(1))
    for now_s in range(0, 1000, 10):
        held = store.find(keys("question 1").exact, now_s)
        assert held is not None
        held.num_hits += 1
    assert store.find(keys("question 1").exact, 1000.0) is None


def test_find_misses_when_only_the_sharing_domain_or_the_model_differs() -> None:
    store = Store(MIB)
    store.put(entry(1, text="q"))
    assert store.find(keys("q").exact, 0.0) is not None
    assert store.find(keys("q", domain="other").exact, 0.0) is None
    assert store.find(keys("q", model="other").exact, 0.0) is None
    assert not store.has_partition(keys("q", domain="other").partition)
    assert not store.has_partition(keys("q", context="system").partition)


def test_put_replaces_when_the_exact_key_is_there() -> None:
    store = Store(MIB)
    store.put(entry(1, text="q"))
    assert [one.id for one in store.put(entry(2, text="q"))] == [1]
    held = store.find(keys("q").exact, 0.0)
    assert held is not None
    assert held.entry.id == 2
    assert len(store) == 1


def test_evict_removes_what_saves_the_least_per_byte() -> None:
    store = Store(12_000, random.Random(0))
    cheap = entry(1, answer=Answer(b"x" * 100, 0.01))
    dear = entry(2, answer=Answer(b"x" * 100, 10.0))
    big = entry(3, answer=Answer(b"x" * 8000, 1.0))
    for one in (cheap, dear, big):
        store.put(one)
    assert [one.id for one in store.evict(700.0)] == [1, 3]


def test_evict_spares_what_is_asked_for() -> None:
    store = Store(7000, random.Random(0))
    for number in (1, 2, 3):
        store.put(entry(number))
    for number in (1, 3):
        held = store.get(EntryId(number), 0.0)
        assert held is not None
        held.num_hits = 5
    assert [one.id for one in store.evict(700.0)] == [2]


@given(st.lists(st.tuples(st.sampled_from("parve"), st.integers(0, 12)), max_size=60), st.randoms())
def test_figures_agree_with_the_entries_after_any_history(
    history: list[tuple[str, int]], rng: random.Random
) -> None:
    store = Store(20_000, rng)
    number = 100
    for now_s, (action, which) in enumerate(history):
        if action == "p":
            number += 1
            store.put(entry(number, text=f"q{which}", created_s=now_s, expires_s=now_s + 30.0))
        elif action == "a":
            for one in list(store)[: which % 3]:
                store.attach(one.entry.id, np.zeros(384, np.float32))
        elif action == "r":
            store.remove([one.entry.id for one in list(store)[: which % 3]])
        elif action == "v":
            store.evict(now_s)
            assert store.num_bytes <= 20_000
        else:
            store.expire(now_s)
            assert all(one.entry.expires_s > now_s for one in store)
        assert store.num_bytes == sum(one.num_bytes for one in store)
        assert store.num_indexed == sum(one.vector is not None for one in store)
        assert sorted(store._places) == sorted(one.entry.id for one in store)
        for one in store:
            assert store._places[one.place] == one.entry.id
            assert store.has_partition(one.entry.keys.partition)
