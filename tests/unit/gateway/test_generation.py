"""One generation, many readers: each gets everything, from the first token, in order."""

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gateway.generation import Generation, Reader
from gateway.request import ReplicaId, Resumable
from gateway.tokens import Finish, FinishReason, TokenLogprobs
from infermesh.errors import Internal, MeshError, ProtocolViolation, SlowConsumer
from tests.unit.gateway.jobs import job

END = Finish(FinishReason.LENGTH)


def generation(**changes: object) -> Generation:
    return Generation(job(**changes), clock=lambda: 0.0)


def test_late_reader_gets_everything_from_the_first_token() -> None:
    one = generation()
    one.join(asyncio.Event(), 100)
    one.extend(0, 0, [7, 8], ())
    one.extend(0, 2, [9], ())
    late = one.join(asyncio.Event(), 100)
    assert [list(news.token_ids) for news in late.take()] == [[7, 8, 9]]


def test_deltas_coalesce_while_a_reader_is_away() -> None:
    one = generation()
    reader = one.join(asyncio.Event(), 100)
    for position in range(5):
        one.extend(0, position, [position], ())
    one.finish(0, END)
    (news,) = reader.take()
    assert list(news.token_ids) == [0, 1, 2, 3, 4]
    assert news.finish is END
    assert reader.take() == []


@pytest.mark.parametrize(("start", "choice"), [(0, 0), (3, 0), (2, 1)])
def test_delta_that_does_not_continue_is_a_violation(start: int, choice: int) -> None:
    one = generation()
    one.extend(0, 0, [7, 8], ())
    with pytest.raises(ProtocolViolation):
        one.extend(choice, start, [9], ())


def test_delta_without_its_logprobs_is_a_violation() -> None:
    one = generation(top_logprobs=0)
    with pytest.raises(ProtocolViolation):
        one.extend(0, 0, [7], ())
    one.extend(0, 0, [7], [TokenLogprobs(-1.0)])


def test_delta_after_the_end_is_a_violation() -> None:
    one = generation()
    one.finish(0, END)
    with pytest.raises(ProtocolViolation):
        one.extend(0, 0, [7], ())
    with pytest.raises(ProtocolViolation):
        one.finish(0, END)


def test_error_comes_after_what_was_generated() -> None:
    one = generation()
    reader = one.join(asyncio.Event(), 100)
    one.extend(0, 0, [7], ())
    one.fail(Internal("broken"))
    assert len(reader.take()) == 1
    with pytest.raises(Internal):
        reader.take()


def test_slow_reader_is_dropped_and_the_other_is_not() -> None:
    one = generation()
    slow, quick = one.join(asyncio.Event(), 4), one.join(asyncio.Event(), 4)
    for position in range(6):
        one.extend(0, position, [position], ())
        quick.take()
    assert one.num_readers == 1
    assert len(slow.take()) == 1
    with pytest.raises(SlowConsumer):
        slow.take()


def test_backlog_at_joining_does_not_make_a_reader_slow() -> None:
    one = generation()
    one.join(asyncio.Event(), 100)
    one.extend(0, 0, list(range(50)), ())
    late = one.join(asyncio.Event(), 4)
    one.extend(0, 50, [50, 51, 52, 53], ())
    (news,) = late.take()
    assert len(news.token_ids) == 54


def test_last_reader_leaving_ends_the_generation() -> None:
    ended: list[bool] = []
    one = generation()
    one.on_abandoned = lambda: ended.append(True)
    readers = [one.join(asyncio.Event(), 9) for _ in range(2)]
    readers[0].close()
    readers[0].close()
    assert ended == []
    readers[1].close()
    assert ended == [True]
    assert one.ended


def test_reader_is_admitted_when_a_scheduler_accepted() -> None:
    one = generation()
    reader = one.join(asyncio.Event(), 9)
    assert not reader.admitted
    one.accept(ReplicaId("replica-0"))
    assert reader.admitted
    assert one.replica_ids == ["replica-0"]


class Readers(RuleBasedStateMachine):
    """However writing, joining, reading and leaving interleave, what a reader has seen is a
    prefix of what was written, and a reader within its limit is never dropped."""

    @initialize()
    def begin(self) -> None:
        self.generation = generation(num_choices=2)
        self.written: list[list[int]] = [[], []]
        self.seen: dict[Reader, list[list[int]]] = {}
        self.dropped = 0
        self.keeper = self.generation.join(asyncio.Event(), 10**6)

    @rule(choice=st.integers(0, 1), count=st.integers(1, 3))
    def write(self, choice: int, count: int) -> None:
        start = len(self.written[choice])
        token_ids = list(range(start, start + count))
        self.generation.extend(choice, start, token_ids, ())
        self.written[choice] += token_ids

    @rule(limit=st.integers(1, 8))
    def join(self, limit: int) -> None:
        self.seen[self.generation.join(asyncio.Event(), limit)] = [[], []]

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        if not self.seen:
            return
        reader = data.draw(st.sampled_from(list(self.seen)))
        try:
            for news in reader.take():
                self.seen[reader][news.choice] += news.token_ids
        except MeshError:
            self.dropped += 1
            del self.seen[reader]
            return
        if reader in self.generation._readers:
            assert self.seen[reader] == self.written

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.seen:
            reader = data.draw(st.sampled_from(list(self.seen)))
            reader.close()
            del self.seen[reader]

    @invariant()
    def seen_is_a_prefix(self) -> None:
        for texts in self.seen.values():
            for seen, written in zip(texts, self.written, strict=True):
                assert seen == written[: len(seen)]


TestReaders = Readers.TestCase
TestReaders.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_device_time_is_accounted_for_once_among_readers() -> None:
    one = generation()
    first = one.join(asyncio.Event(), 100)
    second = one.join(asyncio.Event(), 100)
    one.spend(0, 30)
    assert (first.device_us, second.device_us) == (30, 0)
    first.close()
    one.spend(0, 12)  # of another attempt, or after the first has gone: the second's
    assert (first.device_us, second.device_us) == (30, 12)
    second.close()
    assert first.device_us + second.device_us == one.device_us == 42


def test_reader_that_comes_back_by_key_accounts_for_all_of_the_device_time() -> None:
    name = Resumable(b"key", b"digest", "record")
    one = generation(resumable=name)
    first = one.join(asyncio.Event(), 100)
    one.spend(0, 30)
    first.close()
    assert one.join(asyncio.Event(), 100).device_us == 30
