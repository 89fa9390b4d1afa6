"""Protobuf to the cache's values and back. Decides what is well-formed, nothing else."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from infermesh.errors import NotFound, ProtocolViolation
from infermesh.v1 import sampling_pb2
from infermesh.v1 import semantic_cache_service_pb2 as pb
from services.cache.domain import (
    Answer,
    Draft,
    EntryId,
    Found,
    Keys,
    Mark,
    Query,
    StoreOutcome,
    Traits,
)

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration

_FINGERPRINT_BYTES = 32
_ENTRY_PREFIX = "ans-"
_NUMBER_BYTES = 8
_FINISHED = (sampling_pb2.FINISH_REASON_STOP, sampling_pb2.FINISH_REASON_LENGTH)


def entry_id_to_pb(entry_id: EntryId) -> str:
    """As headers and reports carry it."""
    return f"{_ENTRY_PREFIX}{entry_id:016x}"


def entry_id_from_pb(text: str) -> EntryId:
    """The inverse; what was never an id is not found."""
    try:
        number = int(text.removeprefix(_ENTRY_PREFIX), 16)
    except ValueError:
        raise NotFound("there is no such cache entry", param="entry_id") from None
    if not text.startswith(_ENTRY_PREFIX) or not 0 <= number < 1 << 63:
        raise NotFound("there is no such cache entry", param="entry_id")
    return EntryId(number)


def query_from_pb(query: pb.Query) -> Query:
    """A lookup.

    Raises:
        ProtocolViolation: a fingerprint is not one.
    """
    keys = _keys(query)
    if not _are_whole(keys):
        raise ProtocolViolation("a fingerprint of a query is not of 32 bytes")
    return Query(
        keys,
        query.text,
        _traits(query.traits),
        _seconds(query.max_age) if query.HasField("max_age") else None,
        _seconds(query.deadline) if query.HasField("deadline") else None,
    )


def mark_to_pb(mark: Mark) -> bytes:
    """As gateways carry it, who don't look into it."""
    return mark.instance + mark.number.to_bytes(_NUMBER_BYTES, "big")


def mark_from_pb(data: bytes) -> Mark | None:
    """The inverse; None where there is none."""
    if len(data) <= _NUMBER_BYTES:
        return None
    return Mark(data[:-_NUMBER_BYTES], int.from_bytes(data[-_NUMBER_BYTES:], "big"))


def found_to_pb(lookup_id: int, found: Found, mark: Mark) -> pb.LookupResponse:
    """What a lookup came to."""
    decision = found.decision
    outcome, reason = decision.outcome.name, decision.reason.name
    response = pb.LookupResponse(
        lookup_id=lookup_id,
        outcome=pb.LookupOutcome.Value(f"LOOKUP_OUTCOME_{outcome}"),
        reason=pb.LookupReason.Value(f"LOOKUP_REASON_{reason}"),
        similarity=decision.similarity,
        mark=mark_to_pb(mark),
    )
    if found.entry is not None:
        response.age.FromTimedelta(timedelta(seconds=found.age_s))
        response.entry_id = entry_id_to_pb(found.entry.id)
        response.answer.ParseFromString(found.entry.answer.payload)
    return response


def draft_from_pb(entry: pb.Entry) -> Draft | StoreOutcome:
    """An offer, or why it is not admissible."""
    keys = _keys(entry)
    answer = entry.answer
    if not _are_whole(keys) or not all(_has_its_logprobs(choice) for choice in answer.choices):
        return StoreOutcome.MALFORMED
    if not answer.choices or not all(_is_finished(choice) for choice in answer.choices):
        return StoreOutcome.INCOMPLETE
    return Draft(
        keys,
        entry.text,
        _traits(entry.traits),
        Answer(answer.SerializeToString(), max(0.0, answer.compute_seconds)),
        _seconds(entry.ttl) if entry.HasField("ttl") else None,
        entry.replace,
        mark_from_pb(entry.mark),
    )


def _is_finished(choice: pb.AnswerChoice) -> bool:
    return choice.finish_reason in _FINISHED and len(choice.token_ids) > 0


def _has_its_logprobs(choice: pb.AnswerChoice) -> bool:
    return len(choice.logprobs) in (0, len(choice.token_ids))


def _keys(of: pb.Query | pb.Entry) -> Keys:
    return Keys(
        of.exact_fingerprint,
        of.compatibility_fingerprint,
        of.tenant,
        of.sharing_domain,
        of.model_id,
        of.model_fingerprint,
    )


def _are_whole(keys: Keys) -> bool:
    lengths = {len(keys.exact_fingerprint), len(keys.compatibility_fingerprint)}
    return lengths == {_FINGERPRINT_BYTES}


def _traits(traits: pb.RequestTraits) -> Traits:
    return Traits(
        semantic_enabled=traits.semantic_enabled,
        has_tools=traits.has_tools,
        has_media=traits.has_media,
        n=max(traits.n, 1),
        wants_logprobs=traits.wants_logprobs,
        sampling_beyond_policy=traits.sampling_beyond_policy,
        no_cache=traits.no_cache,
    )


def _seconds(duration: Duration) -> float:
    return max(0.0, duration.seconds + duration.nanos / 1e9)
