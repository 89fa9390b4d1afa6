"""Sessions of the real SchedulerServicer: what a gateway submits, cancels and hears."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import grpc
import pytest

from infermesh.v1 import errors_pb2, sampling_pb2
from services.scheduler.sequence import Request
from tests.contract.scheduler.harness import Gateway, expected, running
from tests.model_shard import ModelShard


def count_requests() -> int:
    """Requests that this process holds, open or over."""
    gc.collect()
    return sum(type(one) is Request for one in gc.get_objects())


@pytest.mark.parametrize("gateway_packs", [True, False])
@pytest.mark.parametrize("shard_packs", [True, False])
async def test_session_answers_like_the_oracle_when_requests_are_multiplexed(
    tmp_path: Path, gateway_packs: bool, shard_packs: bool
) -> None:
    async with running(tmp_path, ModelShard(packs_rows=shard_packs)) as mesh:
        gateway = Gateway(mesh, gateway_packs)
        prompts = {i: [2 + i % 7, 3, 4, 5 + i % 3, 6] for i in range(1, 25)}
        for stream_id, prompt in prompts.items():
            await gateway.submit(stream_id, prompt, n=1 + stream_id % 2)
        await gateway.all_finished()
        assert gateway.ready is not None
        assert gateway.ready.model_fingerprint == "print"
        for (stream_id, choice), output in gateway.outputs.items():
            n = 1 + stream_id % 2
            assert output == expected(prompts[stream_id], choice, n=n)
            assert gateway.finished[stream_id, choice].HasField("timings")
        assert set(gateway.accepted) == set(prompts)
        assert (gateway.num_packed > 0) == gateway_packs
        assert (mesh.shard.servicer.shard.num_decodes > 0) == shard_packs


async def test_session_sends_one_delta_message_per_step_when_many_requests_run(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, ModelShard(max_batch_tokens=32)) as mesh:
        gateway = Gateway(mesh)
        mesh.shard.servicer.hold()
        for stream_id in range(1, 9):
            await gateway.submit(stream_id, [2, 3, stream_id], ignore_eos=True)
        await gateway.until(lambda: len(gateway.accepted) == 8)
        before = gateway.num_messages
        mesh.shard.servicer.release()
        await gateway.all_finished()
        assert gateway.num_messages - before <= mesh.shard.servicer.shard.num_steps_executed


async def test_session_closes_when_the_gateway_half_closes(tmp_path: Path) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        gateway = Gateway(mesh)
        await gateway.submit(1, [2, 3, 4])
        await gateway.call.done_writing()
        await gateway.all_finished()
        assert await gateway.call.read() is grpc.aio.EOF
        assert await gateway.call.code() is grpc.StatusCode.OK


async def test_session_forgets_a_request_when_its_last_choice_has_ended(tmp_path: Path) -> None:
    before = count_requests()
    async with running(tmp_path, ModelShard()) as mesh:
        gateway = Gateway(mesh)
        for stream_id in range(1, 13):
            await gateway.submit(stream_id, [2, 3, 4, stream_id], n=1 + stream_id % 2)
            await gateway.submit(100 + stream_id, [2, 3], max_tokens=0)
        await gateway.submit(13, [5, 6], max_tokens=150, ignore_eos=True)  # the session lives on
        await gateway.all_finished()
        await mesh.changed_until(lambda: mesh.batcher.is_idle)
        assert count_requests() - before <= 1  # the last one may still be on somebody's stack
        await gateway.submit(1, [2, 3, 4])  # its stream_id is free again
        await gateway.until(lambda: 1 in gateway.accepted)


@pytest.mark.parametrize("broken", [False, True], ids=["cancel", "session broken"])
async def test_blocks_are_free_within_the_window_when_a_client_leaves(
    tmp_path: Path, broken: bool
) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        mesh.hold_at_step(20)
        gateway, window = Gateway(mesh), mesh.batcher.settings.max_window
        await gateway.submit(1, [2, 3, 4, 5, 6], max_tokens=150, ignore_eos=True)
        await gateway.until(lambda: len(gateway.outputs[1, 0]) > 3)
        await mesh.shard.servicer.queued(window)
        num_executed = mesh.shard.servicer.shard.num_steps_executed
        if broken:
            gateway.call.cancel()
        else:
            await gateway.cancel(1)
            await gateway.all_finished()
            assert gateway.finished[1, 0].reason == sampling_pb2.FINISH_REASON_CANCELLED
        await mesh.changed_until(lambda: not len(mesh.batcher.roster.requests))
        mesh.shard.servicer.release()
        await mesh.changed_until(lambda: mesh.batcher.is_idle)
        assert mesh.batcher.roster.ledger.pool.num_used == 0
        assert mesh.shard.servicer.shard.num_steps_executed - num_executed <= window


async def test_drain_ends_with_a_request_that_came_and_went_in_one_step(tmp_path: Path) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        gateway, replica = Gateway(mesh), mesh.process._replica
        await gateway.submit(1, [2, 3, 4], max_tokens=1)
        await gateway.all_finished()
        await mesh.changed_until(lambda: mesh.batcher.is_idle)
        mesh.shard.servicer.hold()
        await gateway.submit(2, [2, 3, 4], max_tokens=1)
        await mesh.shard.servicer.queued(1)
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            draining = tasks.create_task(replica.empty(60.0))
            await gateway.until(lambda: 2 in gateway.moved)  # it waits by now
            mesh.shard.servicer.release()
        assert draining.result() == 0


async def test_choice_ends_alone_when_it_is_cancelled(tmp_path: Path) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        gateway = Gateway(mesh)
        prompt = [2, 3, 4, 5, 6]
        await gateway.submit(1, prompt, n=3, max_tokens=150, ignore_eos=True)
        await gateway.until(lambda: len(gateway.outputs[1, 2]) > 3)
        await gateway.cancel(1, choices=[0, 2])
        await gateway.until(lambda: len(gateway.finished) == 2)
        for choice in (0, 2):
            assert gateway.finished[1, choice].reason == sampling_pb2.FINISH_REASON_CANCELLED
            assert len(gateway.outputs[1, choice]) < 150
        await gateway.all_finished()
        assert gateway.outputs[1, 1] == expected(prompt, 1, n=3, max_tokens=150, ignore_eos=True)
        await gateway.cancel(1, choices=[1])  # they crossed
        await gateway.submit(2, prompt)
        await gateway.until(lambda: (2, 0) in gateway.finished)


async def test_submit_is_refused_with_a_time_when_the_queue_is_full(tmp_path: Path) -> None:
    shard = ModelShard(max_num_seqs=1)
    async with running(tmp_path, shard, max_queue_tokens=10) as mesh:
        gateway = Gateway(mesh)
        mesh.shard.servicer.hold()
        await gateway.submit(1, [2] * 5)
        await gateway.until(lambda: 1 in gateway.accepted)
        await mesh.shard.servicer.queued(1)
        await gateway.submit(2, [2] * 8)
        await gateway.submit(3, [2] * 3)
        await gateway.until(lambda: 3 in gateway.refused)
        refusal = gateway.refused[3].error
        assert refusal.reason == errors_pb2.ERROR_REASON_QUEUE_FULL
        assert refusal.HasField("retry_after")
        mesh.shard.servicer.release()


async def test_request_ends_when_its_deadline_passes(tmp_path: Path) -> None:
    async with running(tmp_path, ModelShard(max_num_seqs=1)) as mesh:
        gateway = Gateway(mesh)
        mesh.shard.servicer.hold()
        await gateway.submit(1, [2, 3, 4], deadline_s=0.15)  # runs
        await gateway.submit(2, [2, 3, 5], deadline_s=0.2)  # waits
        await gateway.all_finished()
        for end in gateway.finished.values():
            assert end.error.reason == errors_pb2.ERROR_REASON_DEADLINE_EXCEEDED
        mesh.shard.servicer.release()
