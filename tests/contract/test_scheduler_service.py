"""The real SchedulerServicer over a unix socket, on the model shard behind a real ShardService."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from infermesh import rpc
from infermesh.config import SchedulerConfig
from infermesh.errors import Internal, ModelLoadFailed, from_rpc_error
from infermesh.v1 import errors_pb2, sampling_pb2, scheduler_service_pb2_grpc
from infermesh.v1 import scheduler_service_pb2 as pb
from services.scheduler.sequence import Request
from services.scheduler.service import SchedulerProcess
from tests.model_shard import EOS, ModelShard, oracle
from tests.model_shard_server import MAX_MODEL_LEN, ShardServer


class Mesh:
    """A scheduler process on a model shard, and a stub to it."""

    def __init__(self, tmp_path: Path, shard: ModelShard, **options: Any) -> None:
        self.shard = ShardServer(f"unix:{tmp_path}/shard", shard)
        config = SchedulerConfig(
            address=f"unix:{tmp_path}/scheduler", shard=self.shard.address, model="model"
        )
        self.config = replace(config, **options)
        self.process = SchedulerProcess(self.config)
        self.channel = rpc.channel(self.config.address)
        self.stub: Any = scheduler_service_pb2_grpc.SchedulerServiceStub(self.channel)

    @property
    def batcher(self) -> Any:
        return self.process._replica.batcher

    async def reaches(self, state: int) -> pb.WatchReplicaResponse:
        watch = self.stub.WatchReplica(pb.WatchReplicaRequest())
        async for status in watch:
            if status.state == state:
                watch.cancel()
                return status
        raise AssertionError("the watch ended")


@asynccontextmanager
async def running(tmp_path: Path, shard: ModelShard, **options: Any) -> AsyncIterator[Mesh]:
    mesh = Mesh(tmp_path, shard, **options)
    await mesh.shard.start()
    try:
        async with asyncio.TaskGroup() as tasks:
            background = tasks.create_task(_run(mesh.process))
            try:
                await mesh.reaches(pb.REPLICA_STATE_SERVING)
                yield mesh
            finally:
                background.cancel()
    finally:
        await mesh.channel.close()
        await mesh.shard.stop()
        assert mesh.shard.servicer.breach is None, mesh.shard.servicer.breach


async def _run(process: SchedulerProcess) -> None:
    try:
        async with asyncio.TaskGroup() as tasks:
            await process.start(tasks)
    finally:
        await process.stop()


class Gateway:
    """One session, its outputs and endings gathered as they come."""

    def __init__(self, mesh: Mesh) -> None:
        self.call = mesh.stub.Session()
        self.outputs: dict[tuple[int, int], list[int]] = {}
        self.finished: dict[tuple[int, int], pb.Finished] = {}
        self.accepted: dict[int, pb.Accepted] = {}
        self.refused: dict[int, pb.Refused] = {}
        self.num_messages = 0
        self.ready: pb.SessionReady | None = None

    async def submit(self, stream_id: int, prompt: list[int], **options: Any) -> None:
        for choice in range(options.get("n", 1)):
            self.outputs[stream_id, choice] = []
        await self.call.write(pb.SessionRequest(submit=submit(stream_id, prompt, **options)))

    async def cancel(self, stream_id: int, choices: Sequence[int] = ()) -> None:
        cancel = pb.Cancel(stream_id=stream_id, choices=choices)
        await self.call.write(pb.SessionRequest(cancel=cancel))

    async def read(self) -> pb.SessionResponse:
        message = await self.call.read()
        assert message is not grpc.aio.EOF, "the session ended"
        self.num_messages += 1
        if message.HasField("ready"):
            self.ready = message.ready
        self.accepted |= {one.stream_id: one for one in message.accepted}
        self.refused |= {one.stream_id: one for one in message.refused}
        for delta in message.deltas:
            output = self.outputs[delta.stream_id, delta.choice]
            assert delta.start == len(output), "a token lost or doubled"
            output.extend(delta.token_ids)
        for end in message.finished:
            assert (end.stream_id, end.choice) not in self.finished
            self.finished[end.stream_id, end.choice] = end
        return message

    async def until(self, done: Any) -> None:
        async with asyncio.timeout(20):
            while not done():
                await self.read()

    async def all_finished(self) -> None:
        await self.until(lambda: set(self.finished) >= set(self.outputs))


def submit(
    stream_id: int,
    prompt: list[int],
    *,
    n: int = 1,
    max_tokens: int = 12,
    ignore_eos: bool = False,
    deadline_s: float | None = None,
    **fields: Any,
) -> pb.Submit:
    message = pb.Submit(
        request_id=f"request-{stream_id}",
        stream_id=stream_id,
        prompt_token_ids=prompt,
        choices=[pb.ChoiceState(index=index) for index in range(n)],
        sampling=sampling_pb2.SamplingParams(seed=3, temperature=0.0 if n == 1 else 1.0),
        stop=sampling_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=ignore_eos),
        **fields,
    )
    if deadline_s is not None:
        message.remaining_deadline.FromMilliseconds(int(deadline_s * 1000))
    return message


def expected(prompt: list[int], choice: int = 0, **options: Any) -> list[int]:
    message = submit(1, prompt, **options)
    return oracle(
        prompt,
        choice,
        message.sampling,
        max_tokens=message.stop.max_tokens,
        max_model_len=MAX_MODEL_LEN,
        stop_token_ids=frozenset() if message.stop.ignore_eos else frozenset({EOS}),
    )


def count_requests() -> int:
    """Requests that this process holds, open or over."""
    gc.collect()
    return sum(type(one) is Request for one in gc.get_objects())


async def test_session_answers_like_the_oracle_when_requests_are_multiplexed(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        gateway = Gateway(mesh)
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
        while not mesh.batcher.is_idle:
            await mesh.process._replica.changed.next().wait()
        assert count_requests() - before <= 1  # the last one may still be on somebody's stack
        await gateway.submit(1, [2, 3, 4])  # its stream_id is free again
        await gateway.until(lambda: 1 in gateway.accepted)


@pytest.mark.parametrize("broken", [False, True], ids=["cancel", "session broken"])
async def test_blocks_are_free_within_the_window_when_a_client_leaves(
    tmp_path: Path, broken: bool
) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        gateway = Gateway(mesh)
        await gateway.submit(1, [2, 3, 4, 5, 6], max_tokens=150, ignore_eos=True)
        await gateway.until(lambda: len(gateway.outputs[1, 0]) > 3)
        mesh.shard.servicer.hold()
        await mesh.shard.servicer.queued(2)
        num_executed = mesh.shard.servicer.shard.num_steps_executed
        if broken:
            gateway.call.cancel()
        else:
            await gateway.cancel(1)
            await gateway.all_finished()
            assert gateway.finished[1, 0].reason == sampling_pb2.FINISH_REASON_CANCELLED
        while len(mesh.batcher.roster.requests):
            await mesh.process._replica.changed.next().wait()
        mesh.shard.servicer.release()
        while not mesh.batcher.is_idle:
            await mesh.process._replica.changed.next().wait()
        assert mesh.batcher.roster.ledger.pool.num_used == 0
        assert mesh.shard.servicer.shard.num_steps_executed - num_executed <= 2


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
        background = tasks.create_task(_run(mesh.process))
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
