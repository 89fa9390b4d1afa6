"""A replica's life behind the real SchedulerServicer: breaks, drains, loading, refusals."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from infermesh.block_hash import BlockHash, extend_hashes, scope_hash, shorten
from infermesh.errors import (
    Internal,
    MeshError,
    ModelLoadFailed,
    ReplicaUnavailable,
    from_rpc_error,
)
from infermesh.v1 import errors_pb2
from infermesh.v1 import scheduler_service_pb2 as pb
from tests.contract.scheduler.harness import Gateway, Mesh, expected, run_process, running
from tests.model_shard import ModelShard
from tests.model_shard_server import MAX_MODEL_LEN


@pytest.mark.parametrize("crash", [False, True], ids=["same incarnation", "restarted"])
async def test_streams_go_on_when_the_shard_breaks_in_mid_stream(
    tmp_path: Path, crash: bool
) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        mesh.hold_at_step(20)
        gateway = Gateway(mesh)
        for stream_id in (1, 2, 3):
            await gateway.submit(stream_id, [2, 3, 4, 5, 6 + stream_id], max_tokens=60, n=2)
        await gateway.until(lambda: any(len(out) > 5 for out in gateway.outputs.values()))
        await mesh.shard.servicer.queued(2)
        if crash:
            await mesh.shard.kill()
            await mesh.reaches(pb.REPLICA_STATE_RECOVERING)
            await mesh.shard.start()
        else:
            mesh.shard.servicer.fail(Internal("a step failed"))
        mesh.shard.servicer.release()
        await gateway.all_finished()
        for (stream_id, choice), output in gateway.outputs.items():
            prompt = [2, 3, 4, 5, 6 + stream_id]
            assert output == expected(prompt, choice, max_tokens=60, n=2)
        assert any(end.timings.num_replays for end in gateway.finished.values())


async def test_requests_end_when_the_shard_comes_back_with_another_model(tmp_path: Path) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        mesh.hold_at_step(20)
        gateway = Gateway(mesh)
        await gateway.submit(1, [2, 3, 4], max_tokens=150, ignore_eos=True)
        await gateway.until(lambda: gateway.outputs[1, 0])
        await mesh.shard.servicer.queued(2)
        await mesh.shard.kill()
        mesh.shard.servicer.fingerprint = "another"
        await mesh.shard.start()
        mesh.shard.servicer.release()
        await gateway.all_finished()
        error = gateway.finished[1, 0].error
        assert error.reason == errors_pb2.ERROR_REASON_REPLICA_UNAVAILABLE
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.call.read()
        assert from_rpc_error(caught.value).code == "replica_unavailable"


async def test_replica_recovers_when_another_scheduler_took_the_shard(tmp_path: Path) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        gateway = Gateway(mesh)
        await gateway.submit(1, [2, 3, 4, 5], max_tokens=40)
        await gateway.until(lambda: gateway.outputs[1, 0])
        shard = mesh.shard.servicer.shard
        shard.open(shard.epoch + 5)
        await gateway.all_finished()
        assert gateway.outputs[1, 0] == expected([2, 3, 4, 5], max_tokens=40)


async def test_drain_finishes_what_runs_and_refuses_what_comes(tmp_path: Path) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        gateway = Gateway(mesh)
        mesh.shard.servicer.hold()
        await gateway.submit(1, [2, 3, 4])
        await gateway.until(lambda: 1 in gateway.accepted)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(mesh.process.drain(20.0))
            await mesh.reaches(pb.REPLICA_STATE_DRAINING)
            await gateway.submit(2, [2, 3, 4])
            await gateway.until(lambda: 2 in gateway.refused)
            mesh.shard.servicer.release()
            await gateway.until(lambda: (1, 0) in gateway.finished)
        assert gateway.refused[2].error.reason == errors_pb2.ERROR_REASON_DRAINING
        assert gateway.outputs[1, 0] == expected([2, 3, 4])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await Gateway(mesh).read()
        assert from_rpc_error(caught.value).code == "draining"


async def test_drain_hands_back_what_is_left_when_the_grace_is_over(tmp_path: Path) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        gateway = Gateway(mesh)
        mesh.shard.servicer.hold()
        await gateway.submit(1, [2, 3, 4])
        await gateway.until(lambda: 1 in gateway.accepted)
        await mesh.process.drain(0.0)
        await gateway.all_finished()
        assert gateway.finished[1, 0].error.reason == errors_pb2.ERROR_REASON_DRAINING


async def drain(mesh: Mesh) -> int:
    num_open: int = (await mesh.stub.Drain(pb.DrainRequest())).num_open
    return num_open


async def test_drain_call_offers_the_open_requests_and_answers_when_they_are_gone(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        gateway = Gateway(mesh)
        mesh.shard.servicer.hold()
        for stream_id in (1, 2):
            await gateway.submit(stream_id, [2, 3, 4, stream_id], max_tokens=30)
        await gateway.until(lambda: len(gateway.accepted) == 2)
        hurried = pb.DrainRequest()
        hurried.grace.FromMilliseconds(1)
        assert (await mesh.stub.Drain(hurried)).num_open == 2
        await gateway.until(lambda: len(gateway.moved) == 2)
        assert gateway.moved[1].reason == pb.MOVE_REASON_DRAINING
        await mesh.reaches(pb.REPLICA_STATE_DRAINING)
        async with asyncio.TaskGroup() as tasks:
            draining = tasks.create_task(drain(mesh))
            await gateway.cancel(1)  # a gateway has taken it elsewhere
            mesh.shard.servicer.release()
            await gateway.all_finished()  # the other one is finished here
        assert draining.result() == 0
        assert gateway.outputs[2, 0] == expected([2, 3, 4, 2], max_tokens=30)
        await gateway.submit(3, [2, 3])
        await gateway.until(lambda: 3 in gateway.refused)
        assert gateway.refused[3].error.reason == errors_pb2.ERROR_REASON_DRAINING


async def test_requests_are_offered_elsewhere_while_the_device_is_lost(tmp_path: Path) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        gateway = Gateway(mesh)
        mesh.shard.servicer.hold()
        await gateway.submit(1, [2, 3, 4, 5], max_tokens=20)
        await mesh.shard.servicer.queued(1)
        await mesh.shard.kill()
        await gateway.until(lambda: 1 in gateway.moved)
        assert gateway.moved[1].reason == pb.MOVE_REASON_DEVICE_LOST
        assert gateway.moved[1].num_crashes == 1
        await gateway.submit(2, [2, 3, 4, 6], max_tokens=20)
        await gateway.until(lambda: 2 in gateway.moved)
        assert 2 in gateway.accepted
        assert gateway.moved[2].num_crashes == 0
        mesh.shard.servicer.release()
        await mesh.shard.start()
        await gateway.all_finished()  # nobody took them
        assert gateway.outputs[1, 0] == expected([2, 3, 4, 5], max_tokens=20)
        assert gateway.outputs[2, 0] == expected([2, 3, 4, 6], max_tokens=20)
        gateway.moved.clear()
        await gateway.submit(3, [2, 3, 4, 7], max_tokens=20)
        await gateway.all_finished()
        assert not gateway.moved


async def test_shard_is_left_when_it_is_wedged_and_used_again_when_it_goes_on(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, ModelShard(), stall_s=0.3) as mesh:
        gateway = Gateway(mesh)
        await gateway.submit(1, [2, 3, 4, 5], max_tokens=190, ignore_eos=True)
        await gateway.until(lambda: len(gateway.outputs[1, 0]) > 4)
        mesh.shard.servicer.wedge()
        await gateway.until(lambda: 1 in gateway.moved)
        assert gateway.moved[1].reason == pb.MOVE_REASON_DEVICE_LOST
        assert gateway.moved[1].num_crashes == 1
        await mesh.reaches(pb.REPLICA_STATE_RECOVERING)
        epoch = mesh.shard.servicer.shard.epoch
        mesh.shard.servicer.release()
        await gateway.all_finished()
        assert gateway.outputs[1, 0] == expected([2, 3, 4, 5], max_tokens=190, ignore_eos=True)
        assert mesh.shard.servicer.shard.epoch > epoch
        assert mesh.shard.servicer.num_loads == 1


async def test_nothing_is_offered_when_only_the_step_stream_breaks(tmp_path: Path) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        gateway = Gateway(mesh)
        mesh.shard.servicer.hold()
        await gateway.submit(1, [2, 3, 4, 5], max_tokens=20)
        await mesh.shard.servicer.queued(1)
        mesh.shard.servicer.fail(Internal("a step failed"))
        mesh.shard.servicer.release()
        await gateway.all_finished()
        assert gateway.finished[1, 0].timings.num_replays == 1
        assert not gateway.moved


async def test_get_model_gives_manifest_and_files_when_loaded(tmp_path: Path) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        responses = [r async for r in mesh.stub.GetModel(pb.SchedulerServiceGetModelRequest())]
        assert responses[0].manifest.model_id == "model"
        assert b"".join(r.file.data for r in responses[1:]) == b"{}"


async def test_submit_is_refused_by_name_when_a_field_is_not_served(tmp_path: Path) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        gateway = Gateway(mesh)
        await gateway.submit(1, [2], adapter_id="lora")
        await gateway.submit(2, [2], task=pb.TASK_EMBED)
        await gateway.submit(3, [2], prompt_logprobs=1)
        await gateway.submit(4, [2] * MAX_MODEL_LEN)
        await gateway.submit(5, [])
        await gateway.submit(6, [2, 64])
        await gateway.until(lambda: len(gateway.refused) == 6)
        names = [gateway.refused[i].error.param for i in range(1, 7)]
        assert names == ["adapter_id", "task", "prompt_logprobs", "prompt", "prompt", "prompt"]
        reason = gateway.refused[4].error.reason
        assert reason == errors_pb2.ERROR_REASON_CONTEXT_LENGTH_EXCEEDED


async def test_session_ends_when_a_stream_id_is_used_twice(tmp_path: Path) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        gateway = Gateway(mesh)
        mesh.shard.servicer.hold()
        await gateway.submit(1, [2, 3])
        await gateway.submit(1, [2, 3])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.all_finished()
        assert from_rpc_error(caught.value).code == "protocol_violation"
        mesh.shard.servicer.release()


async def test_watch_tells_the_progress_when_the_model_loads(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path, ModelShard())
    mesh.shard.servicer.load_gate.clear()
    await mesh.shard.start()
    async with asyncio.TaskGroup() as tasks:
        background = tasks.create_task(run_process(mesh.process))
        watch = mesh.stub.WatchReplica(pb.WatchReplicaRequest(), wait_for_ready=True)
        async for status in watch:
            assert status.state == pb.REPLICA_STATE_LOADING
            if status.load_stage == "reading weights":
                break
        assert status.load_progress == 0.5
        gateway = Gateway(mesh)
        await gateway.submit(1, [2])
        await gateway.until(lambda: 1 in gateway.refused)
        assert gateway.refused[1].error.reason == errors_pb2.ERROR_REASON_MODEL_LOADING
        mesh.shard.servicer.load_error = ModelLoadFailed("torn")
        mesh.shard.servicer.load_gate.set()
        status = await mesh.reaches(pb.REPLICA_STATE_FAILED)
        assert status.error.message == "torn"
        background.cancel()
    await mesh.channel.close()
    await mesh.shard.stop()


async def test_watch_tells_the_blocks_that_a_gateway_computes_from_the_prompt(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, ModelShard(), enable_prefix_caching=True) as mesh:
        watch = mesh.stub.WatchReplica(pb.WatchReplicaRequest())
        first = await watch.read()
        assert (first.blocks.sequence, first.blocks.is_snapshot) == (1, True)
        block_size = first.blocks.block_size
        assert block_size == mesh.shard.servicer.shard.block_size
        gateway, prompt = Gateway(mesh), list(range(2, 3 + 3 * block_size))
        await gateway.submit(1, prompt, max_tokens=1, sharing_domain="acme")
        await gateway.all_finished()
        hashes: list[BlockHash] = []
        extend_hashes(hashes, scope_hash("acme"), prompt, block_size)
        told, sequence = set(first.blocks.stored), 1
        async with asyncio.timeout(10):
            while not told >= set(shorten(hashes)):
                report = await watch.read()
                if report.HasField("blocks"):
                    sequence += 1
                    assert (report.blocks.sequence, report.blocks.is_snapshot) == (sequence, False)
                    told = (told | set(report.blocks.stored)) - set(report.blocks.removed)
        watch.cancel()
        # a gateway that comes later gets it all at once
        late = await mesh.stub.WatchReplica(pb.WatchReplicaRequest()).read()
        assert late.blocks.is_snapshot
        assert set(late.blocks.stored) == told


async def test_watch_tells_that_all_is_lost_when_the_device_restarted(tmp_path: Path) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        gateway, size = Gateway(mesh), mesh.shard.servicer.shard.block_size
        await gateway.submit(1, list(range(2, 3 + 2 * size)), max_tokens=1)
        await gateway.all_finished()
        watch = mesh.stub.WatchReplica(pb.WatchReplicaRequest())
        assert len((await watch.read()).blocks.stored) >= 2
        await mesh.shard.kill()
        await mesh.shard.start()
        async with asyncio.timeout(10):
            report = await watch.read()
            while not report.blocks.is_snapshot:
                report = await watch.read()
        assert list(report.blocks.stored) == []


@pytest.mark.parametrize(
    ("error", "is_convicted"),
    [(ReplicaUnavailable("the connection is cut"), False), (Internal("the step failed"), True)],
)
async def test_request_is_blamed_for_failed_steps_and_not_for_lost_connections(
    tmp_path: Path, error: MeshError, is_convicted: bool
) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        gateway, servicer = Gateway(mesh), mesh.shard.servicer
        servicer.hold()
        await gateway.submit(1, [2, 3, 4, 5], max_tokens=20)
        for _ in range(3):  # two make it a suspect, the third comes while it runs alone
            await servicer.queued(1)
            servicer.fail(error)
            await servicer.failed()
        servicer.release()
        await gateway.until(lambda: (1, 0) in gateway.finished)
        if is_convicted:
            assert gateway.finished[1, 0].error.reason == errors_pb2.ERROR_REASON_POISONED
        else:
            assert gateway.outputs[1, 0] == expected([2, 3, 4, 5], max_tokens=20)
