"""Answers that a gateway keeps by key: whose turn it is, how long, how many, and who settles."""

import asyncio
from dataclasses import dataclass, field

import pytest

from gateway.generation import Generation
from gateway.records import RequestRecord
from gateway.request import RequestId, Resumable
from gateway.resumption import Kept, Resumption, Share, SharedTicket
from gateway.tokens import Finish, FinishReason
from infermesh.errors import IdempotencyConflict, Internal
from tests.unit.gateway.jobs import job

GRACE_S = 30.0


@dataclass
class FakeTicket:
    settled: list[str] = field(default_factory=list)
    cancelled: int = 0
    headers: dict[str, str] = field(default_factory=dict)

    def settle(self, record: RequestRecord) -> None:
        self.settled.append(record.request_id)

    def cancel(self) -> None:
        self.cancelled += 1


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def name(key: bytes = b"key", digest: bytes = b"body") -> Resumable:
    return Resumable(key, digest, "record")


def generation(key: bytes = b"key", num_tokens: int = 5) -> Generation:
    made = Generation(job(resumable=name(key), prompt_token_ids=(1, 2, 3)), lambda: 0.0)
    made.extend(0, 0, list(range(num_tokens)), ())
    return made


def end(made: Generation) -> Generation:
    made.finish(0, Finish(FinishReason.LENGTH))
    return made


def resumption(clock: Clock | None = None, requests: int = 10, tokens: int = 1000) -> Resumption:
    return Resumption(GRACE_S, requests, tokens, clock or Clock())


async def keep(answers: Resumption, made: Generation) -> None:
    async with answers.turn(made.job.resumable) as entry:
        assert entry is not None
        answers.keep(entry, Kept(made, SharedTicket(FakeTicket())))


async def has(answers: Resumption, key: bytes = b"key") -> bool:
    async with answers.turn(name(key)) as entry:
        assert entry is not None
        return answers.found(entry) is not None


async def test_second_request_waits_until_the_first_has_begun() -> None:
    answers, begun = resumption(), asyncio.Event()

    async def first() -> None:
        async with answers.turn(name()) as entry:
            assert entry is not None
            await begun.wait()
            answers.keep(entry, Kept(generation(), SharedTicket(FakeTicket())))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(first())
        await asyncio.sleep(0)
        second = tasks.create_task(has(answers))
        await asyncio.sleep(0)
        assert not second.done()
        begun.set()
    assert second.result()


async def test_next_request_begins_when_the_first_could_not() -> None:
    answers = resumption()
    with pytest.raises(Internal):
        async with answers.turn(name()):
            raise Internal("refused")
    assert len(answers) == 0
    assert not await has(answers)


async def test_another_body_is_a_conflict_from_the_first_turn_on() -> None:
    answers = resumption()
    async with answers.turn(name()):
        with pytest.raises(IdempotencyConflict):
            async with answers.turn(name(digest=b"another")):
                raise AssertionError("it had a turn")


async def test_failed_answer_is_not_found_and_gone_when_it_ends() -> None:
    answers, made = resumption(), generation()
    await keep(answers, made)
    made.fail(Internal("broken"))
    assert not await has(answers)
    answers.ended(made)
    assert len(answers) == 0


async def test_finished_answer_stays_for_the_grace_and_again_after_each_visit() -> None:
    clock = Clock()
    answers, made = resumption(clock), end(generation())
    await keep(answers, made)
    async with asyncio.TaskGroup() as tasks:
        sweeping = tasks.create_task(answers.run())
        for _ in range(3):
            clock.now_s += GRACE_S - 1
            await asyncio.sleep(0)
            assert await has(answers)
        clock.now_s += GRACE_S
        answers._moved.set()  # in place of the loop's timer, which has another clock
        for _ in range(3):
            await asyncio.sleep(0)
        assert len(answers) == 0
        sweeping.cancel()


async def test_oldest_finished_answers_go_first_and_running_ones_never() -> None:
    answers, running = resumption(tokens=20), generation(b"running", 100)
    await keep(answers, running)
    for key in (b"a", b"b", b"c"):  # 3 of the prompt and 5 of output each
        await keep(answers, end(generation(key)))
    assert [await has(answers, key) for key in (b"a", b"b", b"c", b"running")] == [
        *(False, True, True, True),
    ]


def record(request_id: str, status: str) -> RequestRecord:
    return RequestRecord(RequestId(request_id), "chat", 0.0, status=status)


def shares(count: int) -> tuple[FakeTicket, list[Share]]:
    ticket = FakeTicket()
    shared = SharedTicket(ticket)
    return ticket, [shared.share() for _ in range(count)]


def test_reader_with_the_whole_answer_settles_at_once() -> None:
    ticket, (gone, whole) = shares(2)
    gone.settle(record("gone", "cancelled"))
    assert ticket.settled == []
    whole.settle(record("whole", "running"))
    assert ticket.settled == ["whole"]


def test_last_reader_settles_what_nobody_had_whole() -> None:
    ticket, (one, two) = shares(2)
    one.settle(record("one", "cancelled"))
    one.settle(record("one", "cancelled"))
    assert ticket.settled == []
    two.settle(record("two", "failed"))
    assert ticket.settled == ["two"]


def test_hold_is_given_back_when_every_reader_cancels() -> None:
    ticket, (one, two) = shares(2)
    one.cancel()
    assert ticket.cancelled == 0
    two.cancel()
    two.cancel()
    assert (ticket.cancelled, ticket.settled) == (1, [])
