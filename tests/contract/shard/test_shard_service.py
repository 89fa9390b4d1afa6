"""ShardService over a socket: one suite for the torch and the simulated engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from infermesh.errors import (
    Internal,
    InvalidRequest,
    ModelLoadFailed,
    ModelLoading,
    ProtocolViolation,
    StaleEpoch,
)
from infermesh.v1 import errors_pb2, sampling_pb2
from infermesh.v1 import shard_service_pb2 as pb
from services.shard.service import ShardService
from tests.contract.shard.harness import (
    Stream,
    connected,
    error_of,
    first_step,
    load,
    next_step,
    running_shard,
)
from tests.tiny_models import IM_END_ID, VOCAB_SIZE, write_tiny_model

PROMPT = [40, 41, 42, 43, 44]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(params=["torch", "simulated"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def shard(tmp_path: Path, engine: str) -> AsyncIterator[ShardService]:
    async with running_shard(tmp_path, engine) as service:
        yield service


@pytest.fixture
async def stub(shard: ShardService) -> AsyncIterator[Any]:
    async with connected(shard) as stub:
        yield stub


async def test_describe_is_empty_when_nothing_is_loaded(stub: Any) -> None:
    state = await stub.Describe(pb.DescribeRequest())
    assert state.state == pb.SHARD_STATE_EMPTY
    assert state.incarnation != 0
    assert state.epoch == 0


async def test_load_streams_progress_then_loaded_then_files_when_called(
    stub: Any, model: Path
) -> None:
    responses = await load(stub, model)
    kinds = [response.WhichOneof("kind") for response in responses]
    first = kinds.index("loaded")
    assert set(kinds[:first]) == {"progress"}
    assert set(kinds[first + 1 :]) == {"file"}
    files = b"".join(response.file.data for response in responses[first + 1 :])
    assert files == (model / "tokenizer.json").read_bytes()
    loaded = responses[first].loaded
    assert loaded.manifest.architecture == "llama"
    assert loaded.manifest.model_id == "tiny"
    assert loaded.manifest.vocab_size == VOCAB_SIZE
    assert list(loaded.manifest.eos_token_ids) == [IM_END_ID]
    assert "im_start" in loaded.manifest.chat_template
    assert loaded.manifest.max_model_len == 40 * 4  # what the blocks hold
    assert loaded.capacity.num_blocks == 40


async def test_describe_shows_the_model_when_it_is_loaded(stub: Any, model: Path) -> None:
    loaded = next(r.loaded for r in await load(stub, model) if r.HasField("loaded"))
    state = await stub.Describe(pb.DescribeRequest())
    assert state.state == pb.SHARD_STATE_LOADED
    assert state.model == loaded.manifest
    assert state.capacity == loaded.capacity
    assert state.incarnation == loaded.incarnation


async def test_load_joins_when_the_same_model_is_loading(stub: Any, model: Path) -> None:
    one, two = await asyncio.gather(load(stub, model), load(stub, model))
    assert [r.loaded.manifest for r in one if r.HasField("loaded")] == [
        r.loaded.manifest for r in two if r.HasField("loaded")
    ]


async def test_load_goes_on_when_its_call_is_cancelled(stub: Any, model: Path) -> None:
    call = stub.Load(pb.LoadRequest(model=str(model), num_blocks=40, block_size=4))
    await call.read()
    call.cancel()
    responses = await load(stub, model, max_num_seqs=64, max_batch_tokens=512)
    assert any(response.HasField("loaded") for response in responses)


async def test_load_is_refused_when_another_model_is_loaded(stub: Any, model: Path) -> None:
    await load(stub, model)
    error = await error_of(load(stub, model, max_num_seqs=2))
    assert isinstance(error, InvalidRequest)
    assert "max_num_seqs" in error.message


async def test_load_is_tried_again_when_it_failed(stub: Any, model: Path, tmp_path: Path) -> None:
    missing = tmp_path / "later"
    assert isinstance(await error_of(load(stub, missing)), ModelLoadFailed)
    state = await stub.Describe(pb.DescribeRequest())
    assert state.state == pb.SHARD_STATE_FAILED
    assert state.error.reason == errors_pb2.ERROR_REASON_MODEL_LOAD_FAILED
    missing.symlink_to(model)
    assert any(response.HasField("loaded") for response in await load(stub, missing))


async def test_execute_is_refused_when_nothing_is_loaded(stub: Any) -> None:
    assert isinstance(await error_of(Stream(stub).open(1)), ModelLoading)


async def test_execute_answers_in_order_when_two_steps_are_in_flight(
    stub: Any, model: Path
) -> None:
    await load(stub, model)
    stream = Stream(stub)
    opened = await stream.open(7)
    assert opened.epoch == 7
    assert opened.capacity.num_blocks == 40
    await stream.send(first_step(PROMPT, epoch=7))
    await stream.send(next_step(2, 0, epoch=7))
    results = []
    for step_id in range(3, 8):
        results.append(await stream.result())
        await stream.send(next_step(step_id, 0, epoch=7))
    results += [await stream.result(), await stream.result()]
    assert [result.step_id for result in results] == list(range(1, 8))
    for result in results:
        assert result.epoch == 7
        (row,) = result.rows
        assert row.status == pb.ROW_STATUS_OK
        assert len(row.token_ids) == 1
    state = await stub.Describe(pb.DescribeRequest())
    assert state.num_steps_executed == 7
    assert state.epoch == 7


async def test_execute_repeats_its_tokens_when_the_sequence_starts_again(
    stub: Any, model: Path
) -> None:
    await load(stub, model)
    sampling = sampling_pb2.SamplingParams(temperature=1.0, seed=11)
    runs = []
    for epoch in (1, 2):
        stream = Stream(stub)
        await stream.open(epoch)
        result = await stream.step(first_step(PROMPT, epoch=epoch, sampling=sampling))
        tokens = list(result.rows[0].token_ids)
        for step_id in (2, 3, 4):
            result = await stream.step(next_step(step_id, 0, epoch=epoch))
            tokens += result.rows[0].token_ids
        runs.append(tokens)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("packs_rows", [True, False])
async def test_decodes_give_the_tokens_of_rows_when_they_come_as_slots_alone(
    stub: Any, model: Path, packs_rows: bool
) -> None:
    await load(stub, model)
    sampling = sampling_pb2.SamplingParams(temperature=1.0, seed=11)
    by_rows, by_slots = Stream(stub), Stream(stub)
    await by_rows.open(1)
    expected = [list(r.token_ids) for r in (await by_rows.step(two_prompts(1, sampling))).rows]
    for step_id in (2, 3, 4):
        result = await by_rows.step(next_step(step_id, 1, 0))
        for slot, row in zip((1, 0), result.rows, strict=True):
            expected[slot] += row.token_ids

    opened = await by_slots.open(2, packs_rows=packs_rows)
    assert opened.packs_rows
    got = [list(r.token_ids) for r in (await by_slots.step(two_prompts(2, sampling))).rows]
    for step_id in (2, 3, 4):
        step = pb.StepRequest(epoch=2, step_id=step_id, decodes=[1, 0])
        result = await by_slots.step(step)
        assert len(result.decoded) == (2 if packs_rows else 0)
        tokens = list(result.decoded) + [row.token_ids[0] for row in result.rows]
        for slot, token_id in zip((1, 0), tokens, strict=True):
            got[slot].append(token_id)
    assert got == expected


async def test_decodes_and_rows_share_a_step_when_one_has_logprobs(stub: Any, model: Path) -> None:
    await load(stub, model)
    stream = Stream(stub)
    await stream.open(1, packs_rows=True)
    await stream.step(first_step(PROMPT, slot=0))
    rated = sampling_pb2.SamplingParams(temperature=0.0, top_logprobs=2)
    await stream.step(first_step(PROMPT, slot=1, step_id=2, sampling=rated))
    await stream.step(first_step(PROMPT, slot=2, step_id=3))
    last = first_step(PROMPT, slot=3, step_id=4)
    last.decodes.extend([0, 1, 2])
    result = await stream.step(last)
    assert len(result.decoded) == 1  # up to the one that has more to say
    assert [(row.slot, len(row.logprobs)) for row in result.rows] == [(1, 1), (2, 0), (3, 0)]
    assert all(row.status == pb.ROW_STATUS_OK for row in result.rows)
    # all of a step's rows, packed or not, count as one each
    await stream.send(pb.StepRequest(epoch=1, step_id=5, decodes=[0, 0]))
    assert isinstance(await error_of(stream.read()), ProtocolViolation)


def two_prompts(epoch: int, sampling: sampling_pb2.SamplingParams) -> pb.StepRequest:
    """A step that places the same prompt in slots 0 and 1."""
    step = first_step(PROMPT, epoch=epoch, sampling=sampling)
    step.MergeFrom(first_step(PROMPT, slot=1, epoch=epoch, sampling=sampling, choice=1))
    return step


async def test_execute_answers_what_it_holds_when_the_client_half_closes(
    stub: Any, model: Path
) -> None:
    await load(stub, model)
    stream = Stream(stub)
    await stream.open(1)
    await stream.send(first_step(PROMPT))
    await stream.send(next_step(2, 0))
    await stream.call.done_writing()
    assert [(await stream.result()).step_id for _ in range(2)] == [1, 2]
    with pytest.raises(EOFError):
        await stream.read()
    assert await stream.call.code() is grpc.StatusCode.OK


async def test_execute_ends_the_older_stream_when_a_newer_epoch_opens(
    stub: Any, model: Path
) -> None:
    await load(stub, model)
    old, new = Stream(stub), Stream(stub)
    await old.open(3)
    await new.open(5)
    error = await error_of(old.read())
    assert isinstance(error, StaleEpoch)
    assert error.metadata["epoch"] == "5"
    result = await new.step(first_step(PROMPT, epoch=5))
    assert result.rows[0].status == pb.ROW_STATUS_OK


async def test_execute_refuses_an_epoch_when_it_is_not_higher(stub: Any, model: Path) -> None:
    await load(stub, model)
    current = Stream(stub)
    await current.open(3)
    for epoch in (2, 3):
        error = await error_of(Stream(stub).open(epoch))
        assert isinstance(error, StaleEpoch)
        assert error.metadata["epoch"] == "3"
    result = await current.step(first_step(PROMPT, epoch=3))
    assert result.step_id == 1


@pytest.mark.parametrize(
    "step",
    [
        next_step(2, 0),  # not the first id
        first_step(PROMPT, epoch=2),
        next_step(1, 0),  # an empty slot
        first_step(PROMPT, slot=4),
        first_step(PROMPT, blocks=[0]),
        first_step(PROMPT, blocks=[0, 1, 2, 40]),
        first_step([5] * 65),
        pb.StepRequest(epoch=1, step_id=1, block_copies=[pb.BlockCopy(source=0, destination=40)]),
        pb.StepRequest(epoch=1, step_id=1, finished=[4]),
        pb.StepRequest(epoch=1, step_id=1, rows=[pb.Row(slot=0, num_tokens=1)]),
    ],
)
async def test_execute_ends_with_a_violation_when_a_step_breaks_the_contract(
    stub: Any, model: Path, step: pb.StepRequest
) -> None:
    await load(stub, model)
    stream = Stream(stub)
    await stream.open(1)
    assert isinstance(await error_of(stream.step(step)), ProtocolViolation)
    again = Stream(stub)
    await again.open(2)
    assert (await again.step(first_step(PROMPT, epoch=2))).rows[0].status == pb.ROW_STATUS_OK


async def test_execute_ends_with_a_violation_when_the_first_message_is_a_step(
    stub: Any, model: Path
) -> None:
    await load(stub, model)
    assert isinstance(await error_of(Stream(stub).step(next_step(1, 0))), ProtocolViolation)


async def test_execute_fails_one_row_when_its_content_is_wrong(stub: Any, model: Path) -> None:
    await load(stub, model)
    stream = Stream(stub)
    await stream.open(1)
    bad, good = first_step([VOCAB_SIZE], slot=1), first_step(PROMPT)
    bad.MergeFrom(pb.StepRequest(rows=good.rows, new_sequences=good.new_sequences))
    first = await stream.step(bad)
    assert [row.status for row in first.rows] == [pb.ROW_STATUS_FAILED, pb.ROW_STATUS_OK]
    assert first.rows[0].error.reason == errors_pb2.ERROR_REASON_INVALID_REQUEST
    second = await stream.step(next_step(2, 1, 0))
    assert [row.status for row in second.rows] == [pb.ROW_STATUS_SKIPPED, pb.ROW_STATUS_OK]
    third = first_step(PROMPT, slot=1, step_id=3)
    third.finished.append(1)
    assert (await stream.step(third)).rows[0].status == pb.ROW_STATUS_OK


async def test_execute_ends_as_internal_and_the_next_epoch_works_when_a_step_raises(
    stub: Any, model: Path, shard: ShardService, monkeypatch: pytest.MonkeyPatch
) -> None:
    await load(stub, model)
    held = shard._residency.model
    assert held is not None
    stream = Stream(stub)
    await stream.open(1)
    both_sent = threading.Event()

    def fail(pairs: object) -> None:
        both_sent.wait(10)
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(held.engine, "copy_blocks", fail)
        copies = [pb.BlockCopy(source=0, destination=1)]
        await stream.send(pb.StepRequest(epoch=1, step_id=1, block_copies=copies))
        await stream.send(first_step(PROMPT, step_id=2))
        both_sent.set()
        error = await error_of(stream.read())
    assert isinstance(error, Internal)
    assert (await stub.Describe(pb.DescribeRequest())).num_steps_executed == 0
    again = Stream(stub)
    await again.open(2)
    assert (await again.step(first_step(PROMPT, epoch=2))).step_id == 1


async def test_execute_drops_queued_steps_when_the_call_is_cancelled(
    stub: Any, model: Path, shard: ShardService
) -> None:
    await load(stub, model)
    stream = Stream(stub)
    await stream.open(1)
    await stream.step(first_step(PROMPT))
    held = asyncio.Event()
    loop = asyncio.get_running_loop()
    release = asyncio.Event()
    # The worker is busy while two steps are queued and the call is cancelled.
    shard._worker.submit(
        lambda: asyncio.run_coroutine_threadsafe(_hold(held, release), loop).result(30)
    )
    await held.wait()
    await stream.send(next_step(2, 0))
    await stream.send(next_step(3, 0))
    session = shard._streams._session
    assert session is not None
    stream.call.cancel()
    await session.ended.wait()
    release.set()
    again = Stream(stub)
    await again.open(2)
    await again.step(first_step(PROMPT, epoch=2))
    assert (await stub.Describe(pb.DescribeRequest())).num_steps_executed == 2


async def _hold(held: asyncio.Event, release: asyncio.Event) -> None:
    held.set()
    await release.wait()


async def test_execute_returns_logprobs_when_a_row_asks(stub: Any, model: Path) -> None:
    await load(stub, model)
    stream = Stream(stub)
    await stream.open(1)
    sampling = sampling_pb2.SamplingParams(temperature=0.0, top_logprobs=3)
    (row,) = (await stream.step(first_step(PROMPT, sampling=sampling))).rows
    (logprobs,) = row.logprobs
    assert len(logprobs.top_token_ids) == len(logprobs.top_logprobs) == 3
    assert logprobs.logprob <= 0


async def test_drain_refuses_new_streams_when_the_shard_shuts_down(
    stub: Any, model: Path, shard: ShardService
) -> None:
    await load(stub, model)
    await shard.drain(0.0)
    error = await error_of(Stream(stub).open(1))
    assert error.code == "draining"
