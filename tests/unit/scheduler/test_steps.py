"""A step's bytes on the wire: a matter of its rows, not of how long their contexts are."""

from __future__ import annotations

import pytest

from infermesh.v1 import shard_service_pb2 as pb
from services.scheduler.batcher import Batcher, BatcherSettings
from services.scheduler.intake import ModelFacts
from services.scheduler.ledger import AppliedStep, Capacity
from services.scheduler.stats import Stats
from services.scheduler.steps import encode
from tests.unit.scheduler.desk import submission
from tests.unit.scheduler.scene import Recorder

BLOCK_SIZE = 16
NUM_ROWS = 8
MODEL = ModelFacts("model", "print", 32_768, 32_000, frozenset({2}))


def decode_steps(context_len: int) -> list[AppliedStep]:
    """Of every sequence one block's worth of decodes, behind contexts of that length."""
    capacity = Capacity(16_384, BLOCK_SIZE, NUM_ROWS, 8_192)
    batcher = Batcher(
        BatcherSettings(window=1, max_queue_tokens=1 << 20), MODEL, capacity, Stats(), lambda: 0.0
    )
    batcher.open_epoch(capacity, contents_survive=False)
    for stream_id in range(NUM_ROWS):
        prompt = [3 + stream_id] * (context_len + stream_id)
        batcher.submit(submission(stream_id, prompt, max_tokens=64), Recorder())
    steps: list[AppliedStep] = []
    while len(steps) < BLOCK_SIZE:
        step = batcher.next_step()
        assert step is not None
        if step.num_known == 0 and len(step.rows) == NUM_ROWS:
            steps.append(step)
        result = pb.StepResult(step_id=step.step_id)
        for row in step.rows:
            token_ids = [7] if row.samples else []
            result.rows.add(slot=row.placement.slot, status=pb.ROW_STATUS_OK, token_ids=token_ids)
        batcher.commit(result)
    return steps


def sizes(steps: list[AppliedStep], packs_rows: bool) -> dict[int, set[int]]:
    """Bytes of steps by how many new blocks they have; ids all as short as each other."""
    found: dict[int, set[int]] = {}
    for step in steps:
        message = encode(1, step, packs_rows)
        message.step_id = 1
        num_new = 0
        for row in message.rows:
            num_new += len(row.new_block_ids)
            row.slot = 1
            row.new_block_ids[:] = [1] * len(row.new_block_ids)
        found.setdefault(num_new, set()).add(len(message.SerializeToString()))
    return found


@pytest.mark.parametrize("packs_rows", [True, False])
def test_step_bytes_are_the_same_when_contexts_are_three_hundred_times_as_long(
    packs_rows: bool,
) -> None:
    short, long = (sizes(decode_steps(length), packs_rows) for length in (100, 30_000))
    assert {0, 1} <= short.keys() & long.keys()
    for num_new in short.keys() & long.keys():
        assert short[num_new] == long[num_new]
        assert len(long[num_new]) == 1
    assert max(max(one) for one in long.values()) <= 16 * NUM_ROWS + 8
