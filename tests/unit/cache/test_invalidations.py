"""Which answers are too old to be kept, whatever came in between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache.domain import Keys, Mark
from services.cache.invalidations import MAX_REMEMBERED, Invalidations
from tests.unit.cache.entries import keys

TENANTS = ("acme", "globex", "initech")


def of(tenant: str) -> Callable[[Keys], bool]:
    return lambda asked: asked.tenant == tenant


@given(st.lists(st.sampled_from(TENANTS), max_size=20), st.integers(0, 20))
def test_an_answer_is_void_exactly_when_its_tenant_was_invalidated_since(
    invalidated: list[str], begins_after: int
) -> None:
    invalidations = Invalidations()
    marks = [invalidations.mark]
    for tenant in invalidated:
        invalidations.add(of(tenant))
        marks.append(invalidations.mark)
    begins_after = min(begins_after, len(invalidated))
    for tenant in TENANTS:
        is_void = invalidations.void(marks[begins_after], keys(domain=tenant))
        assert is_void == (tenant in invalidated[begins_after:])


def test_an_answer_is_void_when_its_mark_is_older_than_what_is_remembered() -> None:
    invalidations = Invalidations()
    began = invalidations.mark
    for _ in range(MAX_REMEMBERED):
        invalidations.add(of("globex"))
    assert not invalidations.void(began, keys())
    invalidations.add(of("globex"))
    assert invalidations.void(began, keys())


@pytest.mark.parametrize("mark", [None, Mark(b"another life", 0), Mark(b"this", 1)])
def test_an_answer_is_void_when_nobody_knows_when_it_began(mark: Mark | None) -> None:
    assert Invalidations(b"this").void(mark, keys())


def test_two_lives_of_a_cache_have_different_marks() -> None:
    assert Invalidations().mark != Invalidations().mark
