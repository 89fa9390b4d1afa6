"""What a step's result does to the sequences in it: tokens accepted, dropped, or started again.

    OK       KV is there; the token is taken unless the sequence is over (surplus) or void
    FAILED   its request ends with the row's error; readers of what it was to fill start again
    SKIPPED  its slot failed before: nothing to do

Reads the shard's protobuf rows directly: a translation would cost as much as the rest.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from infermesh.errors import ProtocolViolation, SlowConsumer, from_detail
from infermesh.v1 import shard_service_pb2
from services.scheduler.fairness import charge_output
from services.scheduler.ids import StepId
from services.scheduler.ledger import AppliedRow, AppliedStep
from services.scheduler.roster import Roster
from services.scheduler.sequence import Placement

_OK = shard_service_pb2.ROW_STATUS_OK
_FAILED = shard_service_pb2.ROW_STATUS_FAILED


def verify(step: AppliedStep, result: shard_service_pb2.StepResult) -> None:
    """Raises ProtocolViolation unless `result` answers `step`."""
    num_decoded, num_rows = len(result.decoded), len(result.rows)
    if result.step_id != step.step_id or num_decoded + num_rows != len(step.rows):
        raise ProtocolViolation(
            f"result of step {result.step_id} with {num_decoded + num_rows} rows; expected step "
            f"{step.step_id} with {len(step.rows)}"
        )
    if num_decoded > step.num_decodes:
        raise ProtocolViolation(f"{num_decoded} decoded tokens of {step.num_decodes} decodes")
    for row, outcome in zip(step.rows[num_decoded:], result.rows, strict=True):
        place = row.placement
        status = outcome.status
        if outcome.slot != place.slot:
            raise ProtocolViolation(f"a row of slot {outcome.slot} where {place.slot} was due")
        if status == _OK:
            if len(outcome.token_ids) != row.samples:
                raise ProtocolViolation(f"slot {place.slot}: {len(outcome.token_ids)} tokens")
        elif status != _FAILED and place.sequence.placement is place:
            raise ProtocolViolation(f"slot {place.slot} was not run and had not failed")


def take(
    roster: Roster,
    step: AppliedStep,
    result: shard_service_pb2.StepResult,
    later: Seq[AppliedStep],
) -> int:
    """Applies a verified result; `later` are the steps still in flight. Returns tokens kept."""
    num_kept, step_id, now_s = 0, step.step_id, roster.clock()
    token_us = result.timings.execute_us / step.num_tokens
    for row in step.rows:  # none of them is in flight any more
        place = row.placement
        sequence = place.sequence
        sequence.num_in_flight -= 1
        sequence.device_us += token_us * (row.end - row.first)
        place.num_sampling -= row.samples
    decoded = list(result.decoded)
    for row, token_id in zip(step.rows, decoded, strict=False):  # the first ones
        if not row.placement.is_void:
            num_kept += _ran(roster, row, [token_id], (), step_id, now_s)
    for row, outcome in zip(step.rows[len(decoded) :], result.rows, strict=True):
        if outcome.status == _OK:
            if not row.placement.is_void:
                tokens, logprobs = outcome.token_ids, outcome.logprobs
                num_kept += _ran(roster, row, tokens, logprobs, step_id, now_s)
        elif outcome.status == _FAILED:
            _fail(roster, row.placement, outcome, step_id, later)
    return num_kept


def _ran(
    roster: Roster,
    row: AppliedRow,
    tokens: Seq[int],
    logprobs: Seq[object],
    step_id: StepId,
    now_s: float,
) -> int:
    place = row.placement
    sequence = place.sequence
    roster.ledger.executed(place, row.end, step_id)
    if not row.samples or sequence.is_over:
        return 0
    sequence.token_ids.append(tokens[0])
    charge_output(sequence)
    if sequence.placement is None:  # it waits, and may have become a long one
        roster.ledger.hash_blocks(sequence)
    line = sequence.timeline
    line.last_token_s = now_s
    if line.first_token_s is None:
        line.first_token_s = now_s
        roster.stats.first_token(line)
    in_time = roster.requests.emit(sequence, tokens, logprobs)
    verdict = sequence.request.stop.verdict(sequence.token_ids, sequence.prompt_len)
    if verdict is not None:
        roster.finish(sequence, verdict)
    elif not in_time:
        roster.fail(sequence.request, SlowConsumer("the gateway reads slower than tokens are made"))
    if sequence.num_crashes and roster.suspects.clear(sequence):
        roster.make_way()
    return 1


def _fail(
    roster: Roster,
    place: Placement,
    outcome: shard_service_pb2.RowResult,
    step_id: StepId,
    later: Seq[AppliedStep],
) -> None:
    roster.fail(place.sequence.request, from_detail(outcome.error))
    if not place.is_void:
        in_flight = list(dict.fromkeys(row.placement for step in later for row in step.rows))
        roster.restart(roster.ledger.void(place, step_id, in_flight))
