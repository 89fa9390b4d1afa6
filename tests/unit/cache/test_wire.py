"""The values of the core and the names on the wire are the same."""

from __future__ import annotations

import enum
from typing import Any

import pytest

from infermesh.v1 import semantic_cache_service_pb2 as pb
from services.cache.domain import (
    Answer,
    Decision,
    EntryId,
    Found,
    Mark,
    Outcome,
    Reason,
    StoreOutcome,
)
from services.cache.embedding import State
from services.cache.wire import (
    entry_id_from_pb,
    entry_id_to_pb,
    found_to_pb,
    mark_from_pb,
    mark_to_pb,
)
from tests.unit.cache.entries import entry


@pytest.mark.parametrize(
    ("own", "wire", "prefix"),
    [
        (Outcome, pb.LookupOutcome, "LOOKUP_OUTCOME_"),
        (Reason, pb.LookupReason, "LOOKUP_REASON_"),
        (StoreOutcome, pb.StoreOutcome, "STORE_OUTCOME_"),
        (State, pb.EmbedderState, "EMBEDDER_STATE_"),
    ],
)
def test_every_value_has_its_name_on_the_wire(own: type[enum.Enum], wire: Any, prefix: str) -> None:
    names = {name.removeprefix(prefix) for name, value in wire.items() if value}
    assert names == {one.name for one in own}


@pytest.mark.parametrize("number", [0, 1, (1 << 62) + 12345, (1 << 63) - 1])
def test_entry_id_round_trips(number: int) -> None:
    assert entry_id_from_pb(entry_id_to_pb(EntryId(number))) == number


def test_a_mark_round_trips_and_what_was_none_is_none() -> None:
    mark = Mark(b"sixteen bytes ..", 300)
    assert mark_from_pb(mark_to_pb(mark)) == mark
    assert mark_from_pb(b"") is None
    assert mark_from_pb(b"short") is None


def test_found_carries_the_answer_only_when_it_is_a_hit() -> None:
    payload = pb.Answer(prompt_tokens=7).SerializeToString()
    held = entry(9, answer=Answer(payload, 0.0))
    decision = Decision(Outcome.HIT_SEMANTIC, Reason.SAME_MEANING, 0.97, held.id)
    hit = found_to_pb(3, Found(decision, held, 1.5), Mark(b"i", 1))
    assert (hit.lookup_id, hit.answer.prompt_tokens, hit.age.seconds) == (3, 7, 1)
    assert hit.entry_id == "ans-0000000000000009"
    miss = found_to_pb(3, Found(Decision(Outcome.MISS, Reason.NO_CANDIDATE)), Mark(b"i", 1))
    assert not miss.HasField("answer")
    assert not miss.HasField("similarity")
    assert miss.entry_id == ""
