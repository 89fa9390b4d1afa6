"""Requests with an idempotency key move between sessions, and outlive all of them for a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infermesh.v1 import errors_pb2, sampling_pb2
from infermesh.v1 import scheduler_service_pb2 as pb
from tests.contract.scheduler.harness import Gateway, Mesh, expected, running, submit
from tests.model_shard import ModelShard

PROMPT = [2, 3, 4, 5, 6]
LONG: dict[str, Any] = {"max_tokens": 150, "ignore_eos": True}
KEYED: dict[str, Any] = {"idempotency_key": b"key", "body_digest": b"body", "record_id": "row"}


def kept(mesh: Mesh) -> Any:
    return mesh.process._replica.kept


def resubmit(stream_id: int, **fields: Any) -> pb.Submit:
    return submit(stream_id, PROMPT, **LONG, **KEYED, **fields)


@pytest.mark.parametrize("n", [1, 2])
async def test_attach_has_all_tokens_of_an_orphan_and_nothing_is_computed_twice(
    tmp_path: Path, n: int
) -> None:
    async with running(tmp_path, ModelShard(num_blocks=128)) as mesh:
        mesh.hold_at_step(20)
        first, second = Gateway(mesh), Gateway(mesh)
        await first.submit(1, PROMPT, n=n, **LONG, **KEYED, attempt=3)
        await first.until(lambda: len(first.outputs[1, n - 1]) > 3)
        await mesh.shard.servicer.queued(2)
        first.call.cancel()
        await second.attach(7, b"key", n=n)
        mesh.shard.servicer.release()
        await second.all_finished()
        for choice in range(n):
            assert second.outputs[7, choice] == expected(PROMPT, choice, n=n, **LONG)
        attached = second.accepted[7].attached
        assert (attached.request_id, attached.attempt) == ("request-1", 3)
        assert list(attached.prompt_token_ids) == PROMPT
        assert attached.sampling.seed == 3
        assert (attached.stop.max_tokens, attached.stop.ignore_eos) == (150, True)
        assert (list(attached.choices), attached.record_id) == (list(range(n)), "row")
        assert not attached.is_accounted
        assert mesh.shard.servicer.shard.num_steps_executed <= 150 + 3


async def test_session_hears_that_its_request_was_taken_over_and_no_more_of_it(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        first, second = Gateway(mesh), Gateway(mesh)
        await first.submit(1, PROMPT, **LONG, **KEYED)
        await first.until(lambda: len(first.outputs[1, 0]) > 3)
        await second.attach(1, b"key")
        await first.until(lambda: 1 in first.moved)
        assert first.moved[1].reason == pb.MOVE_REASON_ATTACHED
        await second.all_finished()
        assert second.outputs[1, 0] == expected(PROMPT, **LONG)
        await first.cancel(1)  # they crossed
        await first.submit(1, PROMPT)  # its stream_id is free again
        await first.all_finished()
        assert len(first.outputs[1, 0]) < 150
        await second.attach(2, b"key")
        await second.until(lambda: (2, 0) in second.finished)


async def test_finished_request_is_answered_again_until_the_grace_is_over(tmp_path: Path) -> None:
    async with running(tmp_path, ModelShard(), resume_grace_s=0.3) as mesh:
        first, second = Gateway(mesh), Gateway(mesh)
        await first.submit(1, PROMPT, **KEYED)
        await first.all_finished()
        for stream_id in (1, 2):
            await second.attach(stream_id, b"key")
            await second.all_finished()
            assert second.outputs[stream_id, 0] == first.outputs[1, 0]
            assert second.finished[stream_id, 0].reason == first.finished[1, 0].reason
            assert second.accepted[stream_id].attached.is_accounted
        await mesh.changed_until(lambda: not len(kept(mesh)))
        await second.attach(3, b"key")
        await second.until(lambda: 3 in second.refused)
        assert second.refused[3].error.reason == errors_pb2.ERROR_REASON_NOT_FOUND


async def test_orphan_is_cancelled_and_its_blocks_are_free_when_nobody_comes(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, ModelShard(), resume_grace_s=0.05) as mesh:
        mesh.hold_at_step(20)
        gateway = Gateway(mesh)
        await gateway.submit(1, PROMPT, **LONG, **KEYED)
        await gateway.until(lambda: len(gateway.outputs[1, 0]) > 3)
        await mesh.shard.servicer.queued(2)
        gateway.call.cancel()
        await mesh.changed_until(lambda: not len(mesh.batcher.roster.requests))
        mesh.shard.servicer.release()
        await mesh.changed_until(lambda: mesh.batcher.is_idle)
        assert mesh.batcher.roster.ledger.pool.num_used == 0
        assert len(kept(mesh)) == 0


async def test_another_body_is_refused_for_attach_and_submit(tmp_path: Path) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        gateway = Gateway(mesh)
        mesh.shard.servicer.hold()
        await gateway.submit(1, PROMPT, **KEYED)
        await gateway.attach(2, b"key", b"another")
        await gateway.submit(3, PROMPT, **{**KEYED, "body_digest": b"another"})
        await gateway.until(lambda: {2, 3} <= gateway.refused.keys())
        for stream_id in (2, 3):
            reason = gateway.refused[stream_id].error.reason
            assert reason == errors_pb2.ERROR_REASON_IDEMPOTENCY_CONFLICT
        mesh.shard.servicer.release()


async def test_cancelled_request_is_not_kept(tmp_path: Path) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        gateway = Gateway(mesh)
        await gateway.submit(1, PROMPT, **LONG, **KEYED)
        await gateway.until(lambda: len(gateway.outputs[1, 0]) > 3)
        await gateway.cancel(1)
        await gateway.attach(2, b"key")
        await gateway.until(lambda: 2 in gateway.refused)
        assert gateway.refused[2].error.reason == errors_pb2.ERROR_REASON_NOT_FOUND


async def test_choice_that_was_cancelled_alone_is_kept_as_it_was(tmp_path: Path) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        first, second = Gateway(mesh), Gateway(mesh)
        await first.submit(1, PROMPT, n=2, **LONG, **KEYED)
        await first.until(lambda: len(first.outputs[1, 1]) > 3)
        await first.cancel(1, choices=[0])
        await first.until(lambda: (1, 0) in first.finished)
        await second.attach(1, b"key", n=2)
        await second.all_finished()
        had = first.outputs[1, 0]
        assert second.outputs[1, 0][: len(had)] == had
        assert second.finished[1, 0].reason == sampling_pb2.FINISH_REASON_CANCELLED
        assert second.outputs[1, 1] == expected(PROMPT, 1, n=2, **LONG)


async def test_resubmission_after_a_broken_session_goes_on_where_the_gateway_is(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        mesh.hold_at_step(20)
        first, second = Gateway(mesh), Gateway(mesh)
        await first.submit(1, PROMPT, **LONG, **KEYED)
        await first.until(lambda: len(first.outputs[1, 0]) > 3)
        await mesh.shard.servicer.queued(2)
        had = first.outputs[1, 0]
        first.call.cancel()
        state = pb.ChoiceState(output_token_ids=had)
        again = resubmit(1, attempt=1)
        del again.choices[:]
        again.choices.append(state)
        second.outputs[1, 0] = list(had)
        await second.call.write(pb.SessionRequest(submit=again))
        await second.until(lambda: 1 in second.accepted)
        assert second.accepted[1].HasField("attached")
        mesh.shard.servicer.release()
        await second.all_finished()
        assert second.outputs[1, 0] == expected(PROMPT, **LONG)
        assert mesh.shard.servicer.shard.num_steps_executed <= 150 + 3


async def test_resubmission_with_other_tokens_takes_the_place_of_the_old_one(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, ModelShard()) as mesh:
        first, second = Gateway(mesh), Gateway(mesh)
        await first.submit(1, PROMPT, **LONG, **KEYED)
        await first.until(lambda: len(first.outputs[1, 0]) > 3)
        again = resubmit(1, attempt=1)
        again.choices[0].output_token_ids.extend([2] * 4)
        second.outputs[1, 0] = [2] * 4
        await second.call.write(pb.SessionRequest(submit=again))
        await first.until(lambda: 1 in first.moved)
        await second.all_finished()
        assert not second.accepted[1].HasField("attached")
        assert len(second.outputs[1, 0]) == 150
        assert (1, 0) not in first.finished
        assert len(mesh.batcher.roster.requests) == 0
