"""Cache messages to the gateway's own values and back. Decides nothing."""

from dataclasses import dataclass

from gateway.cache.fingerprint import Fingerprints
from gateway.cache.verdict import Outcome, StoredAnswer, StoredChoice, Tier, Verdict, miss
from gateway.replica.translate import logprobs_from_pb
from gateway.request import Job
from gateway.tokens import Finish, FinishReason
from infermesh.errors import ProtocolViolation
from infermesh.v1 import sampling_pb2
from infermesh.v1 import semantic_cache_service_pb2 as pb

_OUTCOMES = {
    pb.LOOKUP_OUTCOME_HIT_EXACT: (Outcome.HIT, Tier.EXACT),
    pb.LOOKUP_OUTCOME_HIT_SEMANTIC: (Outcome.HIT, Tier.SEMANTIC),
    pb.LOOKUP_OUTCOME_MISS: (Outcome.MISS, None),
    pb.LOOKUP_OUTCOME_BYPASS: (Outcome.BYPASS, None),
}
_REASONS = {
    FinishReason.STOP: sampling_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: sampling_pb2.FINISH_REASON_LENGTH,
}
_FROM_PB = {value: reason for reason, value in _REASONS.items()}


@dataclass(frozen=True, slots=True)
class Question:
    """A request as the cache is asked about it.

    Attributes:
        semantic: the tenant takes answers of similar questions.
        max_age_s: older answers will not do.
        replace: the fresh answer takes the place of one that would not do.
        mark: the cache's, from before the generation begins; empty where it gave none.
    """

    job: Job
    keys: Fingerprints
    semantic: bool
    max_age_s: int | None = None
    replace: bool = False
    mark: bytes = b""


def query_to_pb(question: Question, timeout_s: float) -> pb.Query:
    """A lookup; its `lookup_id` is the stream's to set."""
    job = question.job
    query = pb.Query(
        request_id=job.request_id,
        exact_fingerprint=question.keys.exact,
        compatibility_fingerprint=question.keys.compatibility,
        tenant=job.tenant,
        sharing_domain=job.sharing_domain,
        model_id=job.model_id,
        model_fingerprint=job.fingerprint,
        text=question.keys.text,
        traits=_traits(question),
        traceparent=job.traceparent,
    )
    # the cache gives up before the gateway stops listening, and says why
    query.deadline.FromMicroseconds(int(timeout_s * 0.8e6))
    if question.max_age_s is not None:
        query.max_age.FromSeconds(question.max_age_s)
    return query


def entry_to_pb(question: Question, answer: StoredAnswer) -> pb.StoreRequest:
    """A fresh answer to keep."""
    job = question.job
    entry = pb.Entry(
        exact_fingerprint=question.keys.exact,
        compatibility_fingerprint=question.keys.compatibility,
        tenant=job.tenant,
        sharing_domain=job.sharing_domain,
        model_id=job.model_id,
        model_fingerprint=job.fingerprint,
        text=question.keys.text,
        traits=_traits(question),
        answer=_answer_to_pb(answer),
        replace=question.replace,
        mark=question.mark,
    )
    return pb.StoreRequest(entry=entry)


def verdict_from_pb(response: pb.LookupResponse) -> Verdict:
    """How a lookup ended; a hit without an answer is a miss."""
    outcome, tier = _OUTCOMES.get(response.outcome, (Outcome.MISS, None))
    reason = reason_name(response.reason)
    similarity = response.similarity if response.HasField("similarity") else None
    if outcome is not Outcome.HIT:
        return Verdict(outcome, reason, similarity=similarity)
    try:
        answer = _answer_from_pb(response.answer)
    except (KeyError, ProtocolViolation):
        return miss("malformed")
    return Verdict(
        outcome,
        reason,
        tier=tier,
        similarity=similarity,
        age_s=response.age.ToMicroseconds() / 1e6,
        entry_id=response.entry_id,
        answer=answer,
    )


def reason_name(reason: "pb.LookupReason.ValueType") -> str:
    """`numbers_differ` for LOOKUP_REASON_NUMBERS_DIFFER; a newer cache's reasons are `other`."""
    if reason not in pb.LookupReason.values():
        return "other"
    return pb.LookupReason.Name(reason).removeprefix("LOOKUP_REASON_").lower()


def _traits(question: Question) -> pb.RequestTraits:
    # tools and media have no trait to set: the edges refuse them
    return pb.RequestTraits(
        semantic_enabled=question.semantic,
        n=question.job.num_choices,
        wants_logprobs=question.job.sampling.top_logprobs is not None,
    )


def _answer_to_pb(answer: StoredAnswer) -> pb.Answer:
    return pb.Answer(
        choices=[_choice_to_pb(index, choice) for index, choice in enumerate(answer.choices)],
        prompt_tokens=answer.prompt_tokens,
        compute_seconds=answer.compute_s,
    )


def _choice_to_pb(index: int, choice: StoredChoice) -> pb.AnswerChoice:
    return pb.AnswerChoice(
        index=index,
        token_ids=choice.token_ids,
        finish_reason=_REASONS[choice.finish.reason],
        stop_token_id=choice.finish.stop_token_id,
        logprobs=[
            sampling_pb2.TokenLogprobs(
                logprob=one.logprob,
                top_token_ids=[token_id for token_id, _ in one.top],
                top_logprobs=[logprob for _, logprob in one.top],
            )
            for one in choice.logprobs
        ],
    )


def _answer_from_pb(answer: pb.Answer) -> StoredAnswer:
    ordered = sorted(answer.choices, key=lambda choice: choice.index)
    if not ordered:
        raise ProtocolViolation("a stored answer has no choice")
    if [choice.index for choice in ordered] != list(range(len(ordered))):
        raise ProtocolViolation("the choices of a stored answer are not numbered from 0")
    return StoredAnswer(
        choices=tuple(_choice_from_pb(choice) for choice in ordered),
        prompt_tokens=answer.prompt_tokens,
        compute_s=answer.compute_seconds,
    )


def _choice_from_pb(choice: pb.AnswerChoice) -> StoredChoice:
    stop_token_id = choice.stop_token_id if choice.HasField("stop_token_id") else None
    return StoredChoice(
        token_ids=tuple(choice.token_ids),
        finish=Finish(_FROM_PB[choice.finish_reason], stop_token_id),
        logprobs=tuple(logprobs_from_pb(choice.logprobs)),
    )
