"""Scheduler messages to the gateway's own values and back. Decides nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.replica.view import MoveReason
from gateway.request import Job, RequestId, Resumable, Sampling, StopRules
from gateway.tokens import ChoiceTimings, Finish, FinishReason, Start, TokenLogprobs
from infermesh.errors import Internal, MeshError, ProtocolViolation, from_detail
from infermesh.v1 import sampling_pb2
from infermesh.v1 import scheduler_service_pb2 as pb

_REASONS = {
    sampling_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    sampling_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    sampling_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}

_MOVES = {
    pb.MOVE_REASON_DRAINING: MoveReason.DRAINING,
    pb.MOVE_REASON_DEVICE_LOST: MoveReason.DEVICE_LOST,
}


@dataclass(frozen=True, slots=True)
class Submission:
    """One attempt of a job: the choices still open, each with what was delivered of it."""

    job: Job
    attempt: int
    delivered: Sequence[tuple[int, Sequence[int]]]
    remaining_s: float | None
    # Losses of a replica or device that it was in flight at, without a token since.
    num_crashes: int = 0


@dataclass(frozen=True, slots=True)
class Attached:
    """A request that was attached to, as it was submitted.

    Attributes:
        is_accounted: a gateway has had all of it.
    """

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    stop: StopRules
    choices: tuple[int, ...]
    record_id: str
    is_accounted: bool


def submit_to_pb(submission: Submission, stream_id: int) -> pb.SessionRequest:
    """The message that submits an attempt."""
    job = submission.job
    submit = pb.Submit(
        request_id=job.request_id,
        stream_id=stream_id,
        attempt=submission.attempt,
        prompt_token_ids=job.prompt_token_ids,
        choices=[
            pb.ChoiceState(index=index, output_token_ids=token_ids)
            for index, token_ids in submission.delivered
        ],
        sampling=_sampling_to_pb(job.sampling),
        stop=_stop_to_pb(job.stop),
        priority=sampling_pb2.Priority.ValueType(job.priority),
        tenant=job.tenant,
        tenant_weight=job.tenant_weight,
        sharing_domain=job.sharing_domain,
        task=pb.TASK_GENERATE,
        traceparent=job.traceparent,
        num_crashes=submission.num_crashes,
    )
    if job.resumable is not None:
        submit.idempotency_key = job.resumable.key
        submit.body_digest = job.resumable.digest
        submit.record_id = job.resumable.record_id
    if submission.remaining_s is not None:
        submit.remaining_deadline.FromMicroseconds(max(0, int(submission.remaining_s * 1e6)))
    return pb.SessionRequest(submit=submit, packs_tokens=True)


def attach_to_pb(name: Resumable, stream_id: int) -> pb.SessionRequest:
    """The message that asks for a request by its key."""
    attach = pb.Attach(stream_id=stream_id, idempotency_key=name.key, body_digest=name.digest)
    return pb.SessionRequest(attach=attach, packs_tokens=True)


def attached_from_pb(message: pb.Attached) -> Attached:
    """What a replica says of a request that it has."""
    sampling, stop = message.sampling, message.stop
    return Attached(
        request_id=RequestId(message.request_id),
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=Sampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=dict(sampling.logit_bias),
            seed=sampling.seed,
            top_logprobs=sampling.top_logprobs if sampling.HasField("top_logprobs") else None,
        ),
        stop=StopRules(
            max_tokens=stop.max_tokens if stop.HasField("max_tokens") else None,
            min_tokens=stop.min_tokens,
            stop_token_ids=tuple(stop.stop_token_ids),
            ignore_eos=stop.ignore_eos,
        ),
        choices=tuple(message.choices),
        record_id=message.record_id,
        is_accounted=message.is_accounted,
    )


def cancel_to_pb(stream_id: int, choices: Sequence[int]) -> pb.SessionRequest:
    """The message that ends these choices of an attempt, or all where none is named."""
    return pb.SessionRequest(cancel=pb.Cancel(stream_id=stream_id, choices=choices))


def without_choice(request: pb.SessionRequest, choice: int) -> pb.SessionRequest:
    """A submit that was not sent yet, for the other choices alone."""
    changed = pb.SessionRequest()
    changed.CopyFrom(request)
    del changed.submit.choices[:]
    changed.submit.choices.extend(c for c in request.submit.choices if c.index != choice)
    return changed


def finish_from_pb(message: pb.Finished) -> Finish | MeshError:
    """How a choice ended, or the error that ended it."""
    if message.reason not in _REASONS:
        if message.HasField("error"):
            return from_detail(message.error)
        return Internal("the replica ended a choice without saying why")
    return Finish(
        reason=_REASONS[message.reason],
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        timings=_timings_from_pb(message.timings),
        cached_prompt_tokens=message.cached_prompt_tokens,
    )


def move_from_pb(message: pb.Moved) -> MoveReason | None:
    """Why a request had better go on elsewhere; None for what is no such offer."""
    return _MOVES.get(message.reason)


def start_from_pb(message: pb.TokenDelta) -> Start:
    """What the first delta of a choice tells beside its token."""
    return Start(_timings_from_pb(message.timings), message.cached_prompt_tokens)


def _timings_from_pb(message: pb.ChoiceTimings) -> ChoiceTimings:
    return ChoiceTimings(
        queue_s=message.queue.ToMicroseconds() / 1e6,
        prefill_s=message.prefill.ToMicroseconds() / 1e6,
        decode_s=message.decode.ToMicroseconds() / 1e6,
        num_preemptions=message.num_preemptions,
        num_replays=message.num_replays,
    )


def logprobs_from_pb(messages: Sequence[sampling_pb2.TokenLogprobs]) -> list[TokenLogprobs]:
    """Log-probabilities of the tokens of one delta.

    Raises:
        ProtocolViolation: likeliest tokens without their values.
    """
    if any(len(m.top_token_ids) != len(m.top_logprobs) for m in messages):
        raise ProtocolViolation("a delta's likeliest tokens and their logprobs differ in number")
    return [
        TokenLogprobs(m.logprob, tuple(zip(m.top_token_ids, m.top_logprobs, strict=True)))
        for m in messages
    ]


def _sampling_to_pb(sampling: Sampling) -> sampling_pb2.SamplingParams:
    return sampling_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
        top_logprobs=sampling.top_logprobs,
    )


def _stop_to_pb(stop: StopRules) -> sampling_pb2.StopConditions:
    return sampling_pb2.StopConditions(
        max_tokens=stop.max_tokens,
        min_tokens=stop.min_tokens,
        stop_token_ids=stop.stop_token_ids,
        ignore_eos=stop.ignore_eos,
    )
