"""The last rungs: which candidate wins, and what a miss reports."""

from __future__ import annotations

from services.cache.domain import EntryId, Outcome, Reason
from services.cache.ladder import Candidate, Policy, decide
from services.cache.wording import analyse

QUESTION = analyse("What is the capital of France?")
SAME = "Tell me the capital of France"
OTHER = "What is the capital of Spain?"
POLICY = Policy(threshold=0.95)


def candidate(entry_id: int, similarity: float, text: str, age_s: float = 10.0) -> Candidate:
    return Candidate(EntryId(entry_id), similarity, analyse(text), age_s)


def test_decide_misses_when_there_is_no_candidate() -> None:
    decision = decide(QUESTION, [], POLICY)
    assert (decision.outcome, decision.reason) == (Outcome.MISS, Reason.NO_CANDIDATE)
    assert decision.similarity is None


def test_decide_hits_when_the_nearest_passes() -> None:
    decision = decide(QUESTION, [candidate(1, 0.96, SAME), candidate(2, 0.99, SAME)], POLICY)
    assert decision.outcome is Outcome.HIT_SEMANTIC
    assert (decision.entry_id, decision.similarity) == (2, 0.99)


def test_decide_goes_on_when_the_guard_refuses_the_nearest() -> None:
    decision = decide(QUESTION, [candidate(1, 0.99, OTHER), candidate(2, 0.96, SAME)], POLICY)
    assert decision.entry_id == 2


def test_decide_reports_the_nearest_when_all_are_refused() -> None:
    decision = decide(QUESTION, [candidate(1, 0.99, OTHER), candidate(2, 0.90, SAME)], POLICY)
    assert decision.outcome is Outcome.MISS
    assert (decision.reason, decision.similarity) == (Reason.NAMES_DIFFER, 0.99)


def test_decide_refuses_by_threshold_only_when_below_it() -> None:
    below = decide(QUESTION, [candidate(1, 0.9499, SAME)], POLICY)
    assert (below.reason, below.similarity) == (Reason.BELOW_THRESHOLD, 0.9499)
    assert decide(QUESTION, [candidate(1, 0.95, SAME)], POLICY).outcome is Outcome.HIT_SEMANTIC


def test_decide_refuses_when_the_answer_is_older_than_the_caller_wants() -> None:
    policy = Policy(threshold=0.95, max_age_s=5.0)
    old, young = candidate(1, 0.99, SAME, age_s=6.0), candidate(2, 0.98, SAME, age_s=4.0)
    assert decide(QUESTION, [old], policy).reason is Reason.TOO_OLD
    assert decide(QUESTION, [old, young], policy).entry_id == 2


def test_decide_applies_the_guard_when_the_cosine_is_one() -> None:
    here = analyse("Trains from Paris to London")
    there = candidate(1, 1.0, "Trains from London to Paris")
    assert decide(here, [there], POLICY).reason is Reason.ROLES_DIFFER
