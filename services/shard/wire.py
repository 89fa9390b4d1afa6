"""Between ShardService's messages and the shard's own values."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from infermesh.errors import ProtocolViolation, to_detail
from infermesh.v1 import model_pb2, sampling_pb2
from infermesh.v1 import shard_service_pb2 as pb
from services.shard.domain import (
    BlockId,
    Capacity,
    Epoch,
    LoadSpec,
    Logprobs,
    Manifest,
    NewSequence,
    Progress,
    Row,
    RowOutcome,
    RowSource,
    RowStatus,
    Sampling,
    Slot,
    Step,
    StepId,
    StepOutcome,
)

_CHUNK_BYTES = 1 << 20

_SOURCES = {
    pb.ROW_SOURCE_LITERAL: RowSource.LITERAL,
    pb.ROW_SOURCE_LAST: RowSource.LAST,
}
_STATUSES = {
    RowStatus.OK: pb.ROW_STATUS_OK,
    RowStatus.FAILED: pb.ROW_STATUS_FAILED,
    RowStatus.SKIPPED: pb.ROW_STATUS_SKIPPED,
}


def load_spec(request: pb.LoadRequest) -> LoadSpec:
    """Zeros and empty strings become the defaults."""
    default = LoadSpec(request.model)
    return LoadSpec(
        model=request.model,
        model_id=request.model_id,
        dtype=request.dtype or default.dtype,
        load_format=request.load_format or default.load_format,
        max_model_len=request.max_model_len,
        kv_cache_bytes=request.kv_cache_bytes,
        block_size=request.block_size or default.block_size,
        max_num_seqs=request.max_num_seqs or default.max_num_seqs,
        max_batch_tokens=request.max_batch_tokens or default.max_batch_tokens,
        num_blocks=request.num_blocks,
        quantize=request.quantize,
        kv_cache_dtype=request.kv_cache_dtype or default.kv_cache_dtype,
    )


def step(request: pb.StepRequest) -> Step:
    """Raises ProtocolViolation for an enum value that this shard does not know."""
    return Step(
        epoch=Epoch(request.epoch),
        step_id=StepId(request.step_id),
        finished=[Slot(slot) for slot in request.finished],
        block_copies=[(BlockId(c.source), BlockId(c.destination)) for c in request.block_copies],
        new_sequences=[_new_sequence(new) for new in request.new_sequences],
        rows=[*map(_decode, request.decodes), *map(_row, request.rows)],
        num_decodes=len(request.decodes),
    )


@lru_cache(maxsize=4096)  # a slot decodes in nearly every step
def _decode(slot: int) -> Row:
    return Row(Slot(slot), num_tokens=1, source=RowSource.LAST, sample=True)


def _new_sequence(new: pb.NewSequence) -> NewSequence:
    return NewSequence(
        slot=Slot(new.slot),
        block_ids=[BlockId(block) for block in new.block_ids],
        num_computed_tokens=new.num_computed_tokens,
        prompt_len=new.prompt_len,
        choice=new.choice,
        sampling=_sampling(new.sampling),
        min_tokens=new.min_tokens,
        suppressed_token_ids=tuple(new.suppressed_token_ids),
        penalty_token_ids=tuple(new.penalty_token_ids),
        traceparent=new.traceparent,
        long_rope=new.long_rope,
    )


def _sampling(params: sampling_pb2.SamplingParams) -> Sampling:
    # The fields are named alike; what is not set keeps the default.
    given = {field.name: value for field, value in params.ListFields()}
    given["logit_bias"] = dict(params.logit_bias)
    return Sampling(**given)


def _row(row: pb.Row) -> Row:
    source = _SOURCES.get(row.source)
    if source is None:
        raise ProtocolViolation(f"slot {row.slot}: row source {row.source} is unknown")
    return Row(
        slot=Slot(row.slot),
        num_tokens=row.num_tokens,
        source=source,
        token_ids=tuple(row.token_ids),
        new_block_ids=[BlockId(block) for block in row.new_block_ids],
        sample=row.sample,
    )


def step_result(outcome: StepOutcome, packs_rows: bool) -> pb.ExecuteResponse:
    """`packs_rows`: the scheduler reads `decoded`."""
    timings = outcome.timings
    decoded = _decoded(outcome) if packs_rows else []
    return pb.ExecuteResponse(
        result=pb.StepResult(
            epoch=outcome.epoch,
            step_id=outcome.step_id,
            decoded=decoded,
            rows=[_row_result(row) for row in outcome.rows[len(decoded) :]],
            timings=pb.StepTimings(
                idle_us=timings.idle_us,
                execute_us=timings.execute_us,
                sample_us=timings.sample_us,
            ),
        )
    )


def _decoded(outcome: StepOutcome) -> list[int]:
    """The tokens of the first decodes, up to one that has more to say."""
    token_ids: list[int] = []
    for row in outcome.rows[: outcome.num_decodes]:
        if row.token_id is None or row.logprobs is not None:
            break
        token_ids.append(row.token_id)
    return token_ids


def _row_result(row: RowOutcome) -> pb.RowResult:
    result = pb.RowResult(slot=row.slot, status=_STATUSES[row.status])
    if row.token_id is not None:
        result.token_ids.append(row.token_id)
    if row.logprobs is not None:
        result.logprobs.append(_logprobs(row.logprobs))
    if row.error is not None:
        result.error.CopyFrom(to_detail(row.error))
    return result


def _logprobs(logprobs: Logprobs) -> sampling_pb2.TokenLogprobs:
    return sampling_pb2.TokenLogprobs(
        logprob=logprobs.logprob,
        top_token_ids=logprobs.top_token_ids,
        top_logprobs=logprobs.top_logprobs,
    )


def opened(epoch: Epoch, incarnation: int, held: Capacity) -> pb.ExecuteResponse:
    return pb.ExecuteResponse(
        opened=pb.EpochOpened(
            epoch=epoch, incarnation=incarnation, capacity=capacity(held), packs_rows=True
        )
    )


def progress(value: Progress) -> pb.LoadResponse:
    return pb.LoadResponse(
        progress=pb.LoadProgress(
            stage=value.stage, bytes_done=value.bytes_done, bytes_total=value.bytes_total
        )
    )


def file_chunks(name: str, content: bytes) -> Iterator[pb.LoadResponse]:
    """The file in pieces; an empty file is one empty piece."""
    for start in range(0, max(1, len(content)), _CHUNK_BYTES):
        piece = content[start : start + _CHUNK_BYTES]
        yield pb.LoadResponse(file=model_pb2.FileChunk(name=name, data=piece))


def capacity(held: Capacity) -> pb.ShardCapacity:
    return pb.ShardCapacity(
        num_blocks=held.num_blocks,
        block_size=held.block_size,
        max_num_seqs=held.max_num_seqs,
        max_batch_tokens=held.max_batch_tokens,
        kv_cache_bytes=held.kv_cache_bytes,
    )


def manifest(model: Manifest) -> model_pb2.ModelManifest:
    return model_pb2.ModelManifest(
        model_id=model.model_id,
        model_fingerprint=model.model_fingerprint,
        architecture=model.architecture,
        dtype=model.dtype,
        quantization=model.quantization,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        bos_token_id=model.bos_token_id,
        pad_token_id=model.pad_token_id,
        chat_template=model.chat_template,
        generation_config_json=model.generation_config_json,
        tokenizer_config_json=model.tokenizer_config_json,
        num_parameters=model.num_parameters,
        weight_bytes=model.weight_bytes,
        source=model.source,
        created_unix_s=model.created_unix_s,
        rope_switch_len=model.rope_switch_len,
    )
