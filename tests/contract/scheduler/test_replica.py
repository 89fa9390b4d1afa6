"""A replica's life behind the real SchedulerServicer: breaks, drains, loading, refusals."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from infermesh.errors import Internal, ModelLoadFailed, from_rpc_error
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
        gateway = Gateway(mesh)
        for stream_id in (1, 2, 3):
            await gateway.submit(stream_id, [2, 3, 4, 5, 6 + stream_id], max_tokens=60, n=2)
        await gateway.until(lambda: any(len(out) > 5 for out in gateway.outputs.values()))
        mesh.shard.servicer.hold()
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
        gateway = Gateway(mesh)
        await gateway.submit(1, [2, 3, 4], max_tokens=150, ignore_eos=True)
        await gateway.until(lambda: gateway.outputs[1, 0])
        mesh.shard.servicer.hold()
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
