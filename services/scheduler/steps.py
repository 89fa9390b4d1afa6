"""An applied step as the bytes that go to the shard.

Builds protobuf below `server.py` on purpose: an intermediate form of our own would double its cost
on every step. Its size does not depend on the context: a running sequence sends its slot and, now
and then, one new block.
"""

from __future__ import annotations

from typing import cast

from infermesh.v1 import sampling_pb2, shard_service_pb2
from services.scheduler.ledger import AppliedRow, AppliedStep
from services.scheduler.sequence import Placement

_LITERAL = shard_service_pb2.ROW_SOURCE_LITERAL
_LAST = shard_service_pb2.ROW_SOURCE_LAST


def encode(epoch: int, step: AppliedStep, packs_rows: bool) -> shard_service_pb2.StepRequest:
    """Encode it right after it was applied: it reads the sequences as they are now.

    Args:
        packs_rows: the shard reads `decodes`; a message for each of them costs ten times as much.
    """
    num_packed = step.num_decodes if packs_rows else 0
    starts = {row.placement: row.first for row in step.rows[len(step.rows) - len(step.placed) :]}
    return shard_service_pb2.StepRequest(
        epoch=epoch,
        step_id=step.step_id,
        finished=step.ended_slots,
        block_copies=[
            shard_service_pb2.BlockCopy(source=source, destination=destination)
            for source, destination in step.copies
        ],
        new_sequences=[_new_sequence(place, starts[place]) for place in step.placed],
        decodes=[row.placement.slot for row in step.rows[:num_packed]],
        rows=[_row(row) for row in step.rows[num_packed:]],
    )


def _row(row: AppliedRow) -> shard_service_pb2.Row:
    if row.from_last:
        return shard_service_pb2.Row(
            slot=row.placement.slot,
            num_tokens=1,
            source=_LAST,
            new_block_ids=row.new_block_ids,
            sample=row.samples,
        )
    return shard_service_pb2.Row(
        slot=row.placement.slot,
        num_tokens=row.end - row.first,
        source=_LITERAL,
        token_ids=row.placement.sequence.token_ids[row.first : row.end],
        new_block_ids=row.new_block_ids,
        sample=row.samples,
    )


def _new_sequence(place: Placement, num_computed: int) -> shard_service_pb2.NewSequence:
    sequence = place.sequence
    request = sequence.request
    stop = request.stop
    return shard_service_pb2.NewSequence(
        slot=place.slot,
        block_ids=place.block_ids,
        num_computed_tokens=num_computed,
        prompt_len=sequence.prompt_len,
        choice=sequence.choice,
        sampling=cast(sampling_pb2.SamplingParams, request.sampling.wire),
        min_tokens=stop.min_tokens,
        suppressed_token_ids=sorted(stop.token_ids) if stop.min_tokens else (),
        penalty_token_ids=sequence.token_ids if request.sampling.needs_history else (),
        traceparent=request.traceparent,
        long_rope=sequence.is_long,
    )
