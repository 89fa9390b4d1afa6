"""What a result does: tokens are taken once, surplus ones never, failures reach all readers."""

from __future__ import annotations

from typing import Any

import pytest

from infermesh.block_hash import extend_hashes, scope_hash
from infermesh.errors import NumericalError, ProtocolViolation, SlowConsumer
from infermesh.v1 import shard_service_pb2 as pb
from infermesh.v1.errors_pb2 import ERROR_REASON_NUMERICAL_ERROR, ErrorDetail
from services.scheduler.batcher import Batcher, BatcherSettings
from services.scheduler.ledger import Capacity
from services.scheduler.sequence import FinishReason, Request, Sequence
from services.scheduler.stats import Stats
from tests.unit.scheduler.scene import EOS, MODEL, Recorder, submission

SIZE = 2
FAILED, SKIPPED = "failed", "skipped"


class Device:
    """A batcher whose results are written by hand."""

    def __init__(self, window: int = 3, **capacity: int) -> None:
        room = {
            "num_blocks": 16,
            "block_size": SIZE,
            "max_num_seqs": 4,
            "max_batch_tokens": 32,
        } | capacity
        self.sink = Recorder()
        self.batcher = Batcher(
            BatcherSettings(window=window),
            MODEL,
            Capacity(**room),
            Stats(lambda: 0.0),
            lambda: 0.0,
        )
        self.batcher.open_epoch(self.batcher.roster.ledger.capacity, contents_survive=True)
        self.num_submitted = 0

    def submit(self, prompt: list[int], **changes: Any) -> Request:
        self.num_submitted += 1
        changes |= {"stream_id": self.num_submitted, "prompt_token_ids": prompt}
        return self.batcher.submit(submission(**changes), self.sink)

    def send(self) -> None:
        """As many steps as the window takes."""
        while self.batcher.next_step() is not None:
            pass

    def result(self, *outcomes: int | str) -> pb.StepResult:
        """The oldest step's result: a token for each row, or how it went wrong."""
        step = self.batcher.in_flight[0]
        result = pb.StepResult(step_id=step.step_id)
        for row, outcome in zip(step.rows, outcomes, strict=True):
            out = result.rows.add(slot=row.placement.slot, status=pb.ROW_STATUS_OK)
            if outcome == FAILED:
                out.status = pb.ROW_STATUS_FAILED
                out.error.CopyFrom(ErrorDetail(reason=ERROR_REASON_NUMERICAL_ERROR, message="nan"))
            elif outcome == SKIPPED:
                out.status = pb.ROW_STATUS_SKIPPED
            elif row.samples:
                out.token_ids.append(int(outcome))
        return result

    def answer(self, *outcomes: int | str) -> None:
        self.batcher.commit(self.result(*outcomes))
        self.batcher.roster.check_integrity()

    def output(self, request: Request, choice: int = 0) -> list[int]:
        return self.sink.outputs.get((request.stream_id, choice), [])

    def num_published(self, tokens: list[int]) -> int:
        """How many blocks of these tokens another sequence would find."""
        hashes: list[Any] = []
        extend_hashes(hashes, scope_hash("tenant"), tokens, SIZE)
        return len(self.batcher.roster.ledger.cache.match(hashes, len(hashes)).block_ids)


def state_of(sequence: Sequence) -> tuple[object, ...]:
    place = sequence.placement
    assert place is not None
    computed = (place.num_planned, place.num_computed, place.num_sampling)
    return list(sequence.token_ids), sequence.num_in_flight, computed


@pytest.mark.parametrize("prompt_len", [3, 4, 5])
def test_surplus_tokens_are_dropped_when_an_earlier_step_of_the_window_ended_it(
    prompt_len: int,
) -> None:
    device, prompt = Device(window=4), [9, 8, 7, 6, 5][:prompt_len]
    request = device.submit(prompt, max_tokens=20)
    device.send()
    device.answer(EOS)
    ending = device.sink.endings[1, 0]
    assert (ending.reason, ending.stop_token_id) == (FinishReason.STOP, EOS)
    for _ in range(3):
        device.answer(55)
    assert device.output(request) == [EOS]
    assert request.sequences[0].token_ids == [*prompt, EOS]
    assert device.batcher.is_idle


@pytest.mark.parametrize("prompt_len", [3, 4, 5])
def test_surplus_tokens_never_enter_a_published_block(prompt_len: int) -> None:
    device, prompt = Device(window=4), [9, 8, 7, 6, 5][:prompt_len]
    device.submit(prompt, max_tokens=20)
    device.send()
    for token_id in (EOS, 55, 55, 55):
        device.answer(token_id)
    # The step behind the last token computes that one; the rest is surplus.
    full, rest = divmod(prompt_len + 1, SIZE)
    assert device.num_published([*prompt, EOS, 55, 55, 55]) == full
    ledger = device.batcher.roster.ledger
    assert (len(ledger.cache), ledger.pool.num_cached) == (full, full + rest)
    if rest:
        hashes: list[Any] = []
        extend_hashes(hashes, scope_hash("tenant"), prompt, SIZE)
        part = ledger.cache.find_part(hashes[-1], [EOS, 55])
        assert part is not None
        assert part.num_tokens == 1


def test_sampled_token_is_published_when_it_is_known_and_withdrawn_when_its_step_fails() -> None:
    device = Device(window=2)
    device.submit([9, 8, 7])
    device.send()  # two steps: the second computes what the first will sample
    assert device.num_published([9, 8, 7, 60]) == 1
    device.answer(60)
    device.send()
    assert device.num_published([9, 8, 7, 60]) == 2
    device.answer(FAILED)
    assert device.num_published([9, 8, 7, 60]) == 1


def test_others_in_the_step_go_on_when_one_ends() -> None:
    device = Device(window=2)
    first, second = device.submit([9, 8, 7]), device.submit([6, 5, 4])
    device.send()
    device.answer(EOS, 60)
    device.answer(55, 61)
    assert (device.output(first), device.output(second)) == ([EOS], [60, 61])


def test_result_is_dropped_when_the_request_was_cancelled_in_flight() -> None:
    device = Device(window=2)
    request = device.submit([9, 8, 7])
    device.send()
    device.answer(60)
    device.send()
    device.batcher.cancel(request)
    device.answer(61)
    device.answer(62)
    assert device.output(request) == [60]
    assert device.sink.endings[1, 0].reason is FinishReason.CANCELLED
    assert device.batcher.is_idle


def test_tokens_in_flight_are_taken_when_their_sequence_was_preempted() -> None:
    device = Device(window=2)
    request = device.submit([9, 8, 7])
    device.send()
    device.batcher.roster.preempt(request.sequences[0])
    device.answer(60)
    device.answer(61)
    assert device.output(request) == [60, 61]
    device.send()
    (row,) = device.batcher.in_flight[0].rows
    assert (row.first, row.end) == (4, 5)  # all but the last token was in the cache


def test_request_fails_alone_when_its_row_failed() -> None:
    device = Device(window=2)
    bad, good = device.submit([9, 8, 7]), device.submit([6, 5, 4])
    device.send()
    device.answer(FAILED, 60)
    assert isinstance(device.sink.endings[bad.stream_id, 0].error, NumericalError)
    device.answer(SKIPPED, 61)  # its slot had failed before
    assert device.output(good) == [60, 61]
    assert device.num_published([9, 8]) == 0


def test_all_choices_end_when_the_row_of_one_failed() -> None:
    device = Device(window=2)
    request = device.submit([9, 8, 7], choices=[(0, []), (1, [])])
    device.send()
    device.answer(FAILED)
    assert {key for key in device.sink.endings if key[0] == request.stream_id} == {(1, 0), (1, 1)}
    assert request.is_over


def test_reader_starts_again_when_what_it_relied_on_failed() -> None:
    device = Device(window=2)
    filler, reader = device.submit([9, 8, 7, 6, 5]), device.submit([9, 8, 7, 6, 4])
    device.send()  # the reader starts behind two blocks that the filler's step is to fill
    sequence = reader.sequences[0]
    assert [row.first for row in device.batcher.in_flight[1].rows] == [5, 4]
    device.answer(FAILED)
    assert filler.is_over
    assert sequence.placement is None
    assert sequence.timeline.num_replays == 1
    device.answer(SKIPPED, 55)  # computed from what was never there
    assert device.output(reader) == []
    device.send()
    assert device.batcher.in_flight[0].rows[0].first == 0
    device.answer(60)
    assert device.output(reader) == [60]


def test_blocks_of_a_fork_are_withdrawn_when_its_leader_failed() -> None:
    device = Device(window=2, block_size=4)
    device.submit([9, 8, 7], choices=[(0, []), (1, [60, 61])])
    device.send()  # the fork copies part of a block that the leader's step is to fill
    assert len(device.batcher.roster.ledger.cache) == 1
    device.answer(FAILED)
    device.answer(SKIPPED, 55)
    assert len(device.batcher.roster.ledger.cache) == 0
    assert device.batcher.is_idle


def test_reader_goes_on_when_its_blocks_were_filled_before_the_failure() -> None:
    device = Device(window=1)
    device.submit([9, 8, 7, 6, 5])
    reader = device.submit([9, 8, 7, 6, 4])
    device.send()
    device.answer(60)
    device.send()
    device.answer(FAILED, 61)
    assert device.output(reader) == [61]
    assert reader.sequences[0].timeline.num_replays == 0


@pytest.mark.parametrize(
    ("max_tokens", "reason"), [(5, FinishReason.ERROR), (1, FinishReason.LENGTH)]
)
def test_slow_reader_ends_its_request_unless_it_is_over_anyway(
    max_tokens: int, reason: FinishReason
) -> None:
    device = Device(window=1)
    device.sink.is_slow = True
    device.submit([9, 8, 7], max_tokens=max_tokens)
    device.send()
    device.answer(60)
    ending = device.sink.endings[1, 0]
    assert ending.reason is reason
    assert isinstance(ending.error, SlowConsumer) is (reason is FinishReason.ERROR)


def test_results_go_out_as_one_message_per_step() -> None:
    device = Device(window=1)
    for token_id in (7, 6, 5):
        device.submit([9, 8, token_id])
    device.send()
    before = device.sink.num_flushes
    device.answer(*[60] * len(device.batcher.in_flight[0].rows))
    assert device.sink.num_flushes == before + 1


@pytest.mark.parametrize("breach", ["step", "missing row", "slot", "no token", "two", "skipped"])
def test_result_is_refused_and_changes_nothing_when_it_breaks_the_protocol(breach: str) -> None:
    device = Device(window=2)
    request = device.submit([9, 8, 7])
    device.send()
    result = device.result(60)
    row = result.rows[0]
    if breach == "step":
        result.step_id += 1
    elif breach == "missing row":
        del result.rows[0]
    elif breach == "slot":
        row.slot += 1
    elif breach == "no token":
        del row.token_ids[:]
    elif breach == "two":
        row.token_ids.append(61)
    else:
        row.status = pb.ROW_STATUS_SKIPPED
    before = state_of(request.sequences[0])
    with pytest.raises(ProtocolViolation):
        device.batcher.commit(result)
    assert state_of(request.sequences[0]) == before
    assert len(device.batcher.in_flight) == 2
    device.answer(60)
    assert device.output(request) == [60]


def test_result_is_refused_when_no_step_is_in_flight() -> None:
    with pytest.raises(ProtocolViolation, match="none is in flight"):
        Device().batcher.commit(pb.StepResult(step_id=1))


def test_time_of_each_step_is_divided_by_tokens_and_nothing_of_it_is_lost() -> None:
    device = Device(window=1)
    long, short = device.submit([9, 8, 7, 6, 5, 4], max_tokens=20), device.submit([3, 2])
    for took_us, outcomes in ((800, (60, 61)), (90, (62, 63))):
        device.send()
        result = device.result(*outcomes)
        result.timings.execute_us = took_us
        device.batcher.commit(result)
    spent = [request.sequences[0].device_us for request in (long, short)]
    assert spent == [600 + 45, 200 + 45]  # 6 and 2 tokens of 8, then one each
    assert long.sequences[0].untold_device_us() == 645
    assert long.sequences[0].untold_device_us() == 0
