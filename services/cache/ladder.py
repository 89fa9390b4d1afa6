"""The last rungs of the ladder: lexical guard, then threshold. Pure.

Candidates are compatible by construction: the index was asked for their partition alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.cache import guard
from services.cache.domain import Decision, EntryId, Outcome, Reason, miss
from services.cache.wording import Wording


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kept answer whose question is near."""

    entry_id: EntryId
    similarity: float
    wording: Wording
    age_s: float


@dataclass(frozen=True, slots=True)
class Policy:
    """What a candidate must satisfy."""

    threshold: float
    max_age_s: float | None = None


def decide(query: Wording, candidates: Sequence[Candidate], policy: Policy) -> Decision:
    """The nearest candidate that passes; on a miss, the reason and score of the nearest of all."""
    refusal = miss(Reason.NO_CANDIDATE)
    for candidate in sorted(candidates, key=lambda one: -one.similarity):
        reason = _refuse(query, candidate, policy)
        if reason is None:
            return Decision(
                Outcome.HIT_SEMANTIC,
                Reason.SAME_MEANING,
                candidate.similarity,
                candidate.entry_id,
            )
        if refusal.similarity is None:
            refusal = miss(reason, candidate.similarity)
    return refusal


def _refuse(query: Wording, candidate: Candidate, policy: Policy) -> Reason | None:
    difference = guard.compare(query, candidate.wording)
    if difference is not None:
        return difference
    if candidate.similarity < policy.threshold:
        return Reason.BELOW_THRESHOLD
    if policy.max_age_s is not None and candidate.age_s > policy.max_age_s:
        return Reason.TOO_OLD
    return None
