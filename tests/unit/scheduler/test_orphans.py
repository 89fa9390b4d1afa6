"""Requests kept for gateways that come back: how long, how many, and for whom."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from infermesh.errors import IdempotencyConflict, NotFound
from infermesh.v1 import sampling_pb2
from services.scheduler.orphans import KeptLimits, KeptRequests
from services.scheduler.sequence import Request, Resumable
from services.scheduler.stats import Stats
from tests.model_shard import ModelShard
from tests.randomised import machine_tests
from tests.unit.scheduler.desk import Desk, submission

GRACE_S = 30.0


def named(key: bytes, digest: bytes = b"body", logprobs: bool = False) -> Resumable:
    stop = sampling_pb2.StopConditions(max_tokens=8)
    return Resumable(key, digest, "record", 0, stop, logprobs)


class House:
    """A desk whose requests have keys, and the keeper of these."""

    def __init__(self, **limits: Any) -> None:
        self.desk = Desk(ModelShard())
        self.kept = KeptRequests(
            KeptLimits(**{"grace_s": GRACE_S, **limits}), Stats(), lambda: self.desk.now_s
        )
        self._count = 0

    def submit(self, key: bytes, prompt_len: int = 3, **changes: Any) -> Request:
        self._count += 1
        wanted = replace(
            submission(self._count, [2 + i % 5 for i in range(prompt_len)], **changes),
            resumable=named(key),
        )
        request = self.desk.batcher.submit(wanted, self.kept.orphanage)
        self.kept.add(request)
        return request

    def finish(self, *requests: Request) -> None:
        self.desk.run()
        assert all(request.is_over for request in requests)


def test_orphan_runs_on_and_is_cancelled_when_its_grace_is_over() -> None:
    house = House()
    request = house.submit(b"key")
    house.kept.orphan(request)
    assert house.kept.next_due_s() == GRACE_S
    house.desk.now_s = GRACE_S - 0.1
    assert house.kept.expire() == []
    assert house.kept.find(b"key", b"body") is request
    house.desk.now_s = GRACE_S
    assert house.kept.expire() == [request]
    with pytest.raises(NotFound):
        house.kept.find(b"key", b"body")
    house.desk.batcher.cancel(request)
    house.desk.run()  # and the ledger is idle
    assert len(house.kept) == 0


def test_attach_saves_an_orphan_from_its_end() -> None:
    house = House()
    request = house.submit(b"key")
    house.kept.orphan(request)
    house.kept.held(request)
    house.desk.now_s = 10 * GRACE_S
    assert house.kept.expire() == []
    assert house.kept.next_due_s() is None


def test_finished_request_is_kept_for_the_grace_and_again_after_an_attach() -> None:
    house = House()
    request = house.submit(b"key")
    house.finish(request)
    ended_s = house.desk.now_s
    assert not house.kept.is_accounted(request)
    house.desk.now_s = ended_s + GRACE_S - 1
    house.kept.held(house.kept.find(b"key", b"body"))
    assert house.kept.is_accounted(request)
    house.desk.now_s += GRACE_S - 1
    assert house.kept.expire() == []
    house.desk.now_s += 1
    assert house.kept.expire() == []  # it does not run: there is nothing to cancel
    assert (len(house.kept), house.kept.num_tokens) == (0, 0)


def test_another_body_is_a_conflict() -> None:
    house = House()
    house.submit(b"key")
    with pytest.raises(IdempotencyConflict):
        house.kept.find(b"key", b"another")
    with pytest.raises(IdempotencyConflict):
        house.kept.twin(replace(submission(9, [2]), resumable=named(b"key", b"another")))


@pytest.mark.parametrize(
    ("outputs", "seed", "continues"),
    [
        ([[]], 7, True),
        ([[]], 8, True),  # nothing of it is delivered yet: the gateway takes this one's seed
        ("its own", 7, True),
        ("its own", 8, False),
        ([[1, 1, 1, 1]], 7, False),
        ([[], []], 7, False),  # a choice more
    ],
)
def test_twin_continues_what_it_has_all_of(outputs: Any, seed: int, continues: bool) -> None:
    house = House()
    request = house.submit(b"key")
    house.finish(request)
    delivered = [request.sequences[0].output[:4]] if outputs == "its own" else outputs
    wire = sampling_pb2.SamplingParams(seed=seed, temperature=1.0)
    again = submission(9, [2, 3, 4], outputs=delivered, n=len(delivered))
    again = replace(again, resumable=named(b"key"), sampling=replace(again.sampling, wire=wire))
    assert house.kept.twin(again) == (request, continues)


def test_log_probabilities_of_an_earlier_attempt_are_missed() -> None:
    house = House()
    wanted = replace(
        submission(1, [2, 3], outputs=[[4, 5]]), resumable=named(b"key", logprobs=True)
    )
    house.kept.add(house.desk.batcher.submit(wanted, house.kept.orphanage))
    with pytest.raises(NotFound, match="log-probabilities"):
        house.kept.find(b"key", b"body")


def test_oldest_finished_go_when_there_are_too_many_tokens() -> None:
    house = House(max_tokens=25)
    for key in (b"a", b"b", b"c"):  # 3 of the prompt and 8 of output each
        house.finish(house.submit(key))
        house.kept.check_integrity()
    assert house.kept.num_tokens == 22
    with pytest.raises(NotFound):
        house.kept.find(b"a", b"body")
    assert house.kept.find(b"c", b"body")


async def test_due_wakes_for_an_orphan_that_comes_while_nothing_was_due() -> None:
    house = House(grace_s=0.0)
    waiting = asyncio.create_task(house.kept.due())
    await asyncio.sleep(0)
    assert not waiting.done()
    house.kept.orphan(house.submit(b"key"))
    async with asyncio.timeout(10):
        await waiting
    assert len(house.kept.expire()) == 1


class KeepingMachine(RuleBasedStateMachine):
    """Any order of submits, losses, attaches, ends and time: nobody stays longer than allowed."""

    running = Bundle("running")

    @initialize(max_requests=st.integers(0, 3), max_tokens=st.integers(0, 40))
    def begin(self, max_requests: int, max_tokens: int) -> None:
        self.house = House(max_requests=max_requests, max_tokens=max_tokens)
        self.count = 0
        self.orphaned_s: dict[Request, float] = {}
        self.touched_s: dict[Request, float] = {}

    @rule(target=running, prompt_len=st.integers(1, 9))
    def submit(self, prompt_len: int) -> Request:
        self.count += 1
        return self.house.submit(b"key %d" % self.count, prompt_len)

    @rule(request=running)
    def lose(self, request: Request) -> None:
        if not request.is_over and self.is_here(request):
            self.house.kept.orphan(request)
            self.orphaned_s[request] = self.house.desk.now_s

    @rule(request=running)
    def attach(self, request: Request) -> None:
        if self.is_here(request):
            self.house.kept.held(request)
            self.orphaned_s.pop(request, None)
            self.touched_s[request] = self.house.desk.now_s

    @rule(request=consumes(running))
    def forget(self, request: Request) -> None:
        self.house.kept.forget(request)
        self.house.desk.batcher.cancel(request)
        self.orphaned_s.pop(request, None)

    @rule()
    def run(self) -> None:
        open_ones = list(self.house.desk.batcher.roster.requests)
        self.house.desk.run()
        for request in open_ones:
            self.orphaned_s.pop(request, None)
            self.touched_s[request] = self.house.desk.now_s

    @rule(seconds=st.floats(0, 2 * GRACE_S))
    def wait(self, seconds: float) -> None:
        self.house.desk.now_s += seconds
        now_s = self.house.desk.now_s
        late = self.house.kept.expire()
        expected = {r for r, s in self.orphaned_s.items() if s + GRACE_S <= now_s}
        assert set(late) == expected
        for request in late:
            self.orphaned_s.pop(request)
            self.house.desk.batcher.cancel(request)

    @invariant()
    def books_agree(self) -> None:
        kept, now_s = self.house.kept, self.house.desk.now_s
        kept.check_integrity()
        assert kept.num_orphans == len(self.orphaned_s)
        due_s = kept.next_due_s()
        assert due_s is None or due_s <= now_s + GRACE_S

    def teardown(self) -> None:
        house = self.house
        for request in house.desk.batcher.roster.requests:
            if request not in self.orphaned_s:
                house.kept.orphan(request)
        house.desk.now_s += GRACE_S
        for request in house.kept.expire():
            house.desk.batcher.cancel(request)
        house.desk.run()  # the ledger is idle
        house.desk.now_s += GRACE_S
        house.kept.expire()
        assert (len(house.kept), house.kept.num_tokens, house.kept.num_orphans) == (0, 0, 0)

    def is_here(self, request: Request) -> bool:
        assert request.resumable is not None
        try:
            return self.house.kept.find(request.resumable.key, b"body") is request
        except NotFound:
            return False


TestKeeping, TestKeepingAtLength = machine_tests(KeepingMachine, 25, 100, num_steps=50)
