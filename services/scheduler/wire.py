"""Between the session's protobuf messages and the scheduler's own types. No state, no policy."""

from __future__ import annotations

from datetime import timedelta
from typing import cast

from google.protobuf.duration_pb2 import Duration

from infermesh.errors import InvalidRequest, UnsupportedParameter, to_detail
from infermesh.v1 import sampling_pb2
from infermesh.v1 import scheduler_service_pb2 as pb
from services.scheduler.intake import Submission
from services.scheduler.sequence import (
    Ending,
    Request,
    Resumable,
    Sampling,
    Sequence,
    Timeline,
)

_DEFAULT_PRIORITY = sampling_pb2.PRIORITY_NORMAL


def submission_from_pb(submit: pb.Submit) -> Submission:
    """Raises InvalidRequest or UnsupportedParameter, naming the field."""
    _refuse_unserved(submit)
    stop = submit.stop
    return Submission(
        request_id=submit.request_id,
        stream_id=submit.stream_id,
        prompt_token_ids=list(submit.prompt_token_ids),
        choices=[(choice.index, list(choice.output_token_ids)) for choice in submit.choices],
        sampling=_sampling(submit.sampling),
        max_tokens=stop.max_tokens if stop.HasField("max_tokens") else None,
        min_tokens=stop.min_tokens,
        stop_token_ids=frozenset(stop.stop_token_ids),
        ignore_eos=stop.ignore_eos,
        priority=submit.priority or _DEFAULT_PRIORITY,
        tenant=submit.tenant,
        tenant_weight=submit.tenant_weight or 1.0,
        remaining_s=(
            submit.remaining_deadline.ToTimedelta().total_seconds()
            if submit.HasField("remaining_deadline")
            else None
        ),
        sharing_domain=submit.sharing_domain,
        traceparent=submit.traceparent,
        num_crashes=submit.num_crashes,
        resumable=_resumable(submit) if submit.idempotency_key else None,
    )


def finished_to_pb(sequence: Sequence, end: Ending) -> pb.Finished:
    """The last message of a choice."""
    return pb.Finished(
        stream_id=sequence.request.stream_id,
        choice=sequence.choice,
        reason=cast("sampling_pb2.FinishReason.ValueType", end.reason.value),
        error=to_detail(end.error) if end.error is not None else None,
        stop_token_id=end.stop_token_id,
        timings=timings_to_pb(sequence.timeline),
        cached_prompt_tokens=sequence.cached_prompt_tokens or 0,
        device_us=sequence.untold_device_us(),
    )


def attached_to_pb(request: Request, is_accounted: bool) -> pb.Attached:
    """The request as it was submitted."""
    facts = request.resumable
    assert facts is not None
    return pb.Attached(
        request_id=request.request_id,
        attempt=facts.attempt,
        prompt_token_ids=request.sequences[0].token_ids[: request.prompt_len],
        sampling=cast("sampling_pb2.SamplingParams", request.sampling.wire),
        stop=cast("sampling_pb2.StopConditions", facts.stop),
        choices=[sequence.choice for sequence in request.sequences],
        record_id=facts.record_id,
        is_accounted=is_accounted,
    )


def _resumable(submit: pb.Submit) -> Resumable:
    return Resumable(
        key=submit.idempotency_key,
        digest=submit.body_digest,
        record_id=submit.record_id,
        attempt=submit.attempt,
        stop=submit.stop,
        has_logprobs=submit.sampling.HasField("top_logprobs"),
    )


def _refuse_unserved(submit: pb.Submit) -> None:
    if submit.adapter_id:
        raise UnsupportedParameter("adapter_id: adapters are not served", param="adapter_id")
    if submit.task not in (pb.TASK_UNSPECIFIED, pb.TASK_GENERATE):
        raise UnsupportedParameter("task: only generate is served", param="task")
    if submit.HasField("prompt_logprobs"):
        raise UnsupportedParameter("prompt_logprobs is not served", param="prompt_logprobs")
    for name in ("seed", "temperature"):
        if not submit.sampling.HasField(name):
            raise InvalidRequest(f"sampling.{name} is not resolved", param=name)
    if submit.priority not in sampling_pb2.Priority.values():
        raise InvalidRequest(f"priority {submit.priority} is unknown", param="priority")


def _sampling(sampling: sampling_pb2.SamplingParams) -> Sampling:
    needs_history = bool(
        sampling.presence_penalty
        or sampling.frequency_penalty
        or (sampling.HasField("repetition_penalty") and sampling.repetition_penalty != 1.0)
    )
    return Sampling(sampling, needs_history, frozenset(sampling.logit_bias))


def timings_to_pb(line: Timeline) -> pb.ChoiceTimings:
    """Where a choice's time went so far."""
    timings = pb.ChoiceTimings(num_preemptions=line.num_preemptions, num_replays=line.num_replays)
    if line.first_step_s is not None:
        timings.queue.CopyFrom(_duration(line.first_step_s - line.arrived_s))
        if line.first_token_s is not None:
            timings.prefill.CopyFrom(_duration(line.first_token_s - line.first_step_s))
    if line.first_token_s is not None and line.last_token_s is not None:
        timings.decode.CopyFrom(_duration(line.last_token_s - line.first_token_s))
    return timings


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=seconds))
    return duration
