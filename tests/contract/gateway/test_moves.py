"""A replica offers its requests to others: they go on there at once, or stay where they are."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from gateway.breaker import BreakerSettings, CircuitBreaker, SlowStart
from gateway.replica.client import ReplicaClient
from infermesh.errors import Draining, Internal, ReplicaUnavailable
from infermesh.v1 import scheduler_service_pb2 as pb
from tests.contract.gateway.test_failover import ASK, holder, read, undisturbed
from tests.fake_scheduler import FakeScheduler
from tests.gateway_process import Edge, make_replicas, running_gateway

DRAINING, DEVICE_LOST = pb.MOVE_REASON_DRAINING, pb.MOVE_REASON_DEVICE_LOST
SERVING, RECOVERING = pb.REPLICA_STATE_SERVING, pb.REPLICA_STATE_RECOVERING


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Edge]:
    async with running_gateway(tmp_path, make_replicas(tmp_path, 2)) as edge:
        for replica in edge.replicas:
            replica.gated = True
        yield edge


def other_than(edge: Edge, first: FakeScheduler) -> FakeScheduler:
    return next(replica for replica in edge.replicas if replica is not first)


def client_of(edge: Edge, replica: FakeScheduler) -> ReplicaClient:
    return next(c for c in edge.service.fleet.clients if c.address == replica.address)


async def seen(edge: Edge, replica: FakeScheduler, serving: bool) -> None:
    """Until the gateway has the replica's report."""
    async with asyncio.timeout(10):
        while client_of(edge, replica).serving != serving:
            await edge.service.fleet.changed(1.0)


async def offered(edge: Edge) -> None:
    """Until the gateway has an offer that it does not take yet."""
    async with asyncio.timeout(10):
        while not edge.service.fleet.listeners:
            await edge.service.fleet.changed(0.01)


def run_on(replica: FakeScheduler) -> None:
    replica.gated = False
    replica._wake.set()


async def failovers(edge: Edge, reason: str) -> float:
    metrics = (await edge.http.get(f"{edge.admin_url}/metrics")).text
    line = f'infermesh_failovers_total{{reason="{reason}"}} '
    return sum(float(one.removeprefix(line)) for one in metrics.splitlines() if line in one)


@pytest.mark.parametrize("reason", [DRAINING, DEVICE_LOST], ids=["draining", "device_lost"])
async def test_stream_goes_on_at_another_replica_when_it_is_offered(
    two: Edge, reason: "pb.MoveReason.ValueType"
) -> None:
    label = {DRAINING: "moved_draining", DEVICE_LOST: "moved_device_lost"}[reason]
    before = await failovers(two, label)
    stream = await two.openai.chat.completions.create(**ASK, stream=True)
    first = holder(two)
    await first.step(7)
    other = other_than(two, first)
    run_on(other)
    first.offer(reason, num_crashes=1)
    texts, _ = await read(stream)
    assert texts == {0: undisturbed()}
    (submit,) = other.submits
    assert (submit.attempt, submit.num_crashes) == (1, 1)
    assert len(submit.choices[0].output_token_ids) == 7
    await first.wait(lambda: first.cancelled == [submit.request_id])
    assert await failovers(two, label) == before + 1


@pytest.mark.parametrize("reason", [DRAINING, DEVICE_LOST], ids=["draining", "device_lost"])
async def test_stream_stays_until_another_replica_can_compute(
    two: Edge, reason: "pb.MoveReason.ValueType"
) -> None:
    stream = await two.openai.chat.completions.create(**ASK, stream=True)
    first = holder(two)
    other = other_than(two, first)
    await other.set_state(RECOVERING)
    await seen(two, other, serving=False)
    if reason == DEVICE_LOST:
        await first.set_state(RECOVERING)
        await seen(two, first, serving=False)
    await first.step(4)
    first.offer(reason)
    await offered(two)
    if reason == DRAINING:  # it goes on here meanwhile
        await first.step(3)
    run_on(other)
    assert other.submits == []
    await other.set_state(SERVING)
    texts, _ = await read(stream)
    assert texts == {0: undisturbed()}
    assert len(other.submits) == 1


@pytest.mark.parametrize("sign", ["tokens", "report"])
async def test_offer_is_void_when_the_device_is_back(two: Edge, sign: str) -> None:
    stream = await two.openai.chat.completions.create(**ASK, stream=True)
    first = holder(two)
    other = other_than(two, first)
    for replica in two.replicas:
        await replica.set_state(RECOVERING)
        await seen(two, replica, serving=False)
    first.offer(DEVICE_LOST)
    client = client_of(two, first)
    await offered(two)
    if sign == "tokens":
        await first.step()
    else:
        await first.set_state(SERVING)
    async with asyncio.timeout(10):
        while two.service.fleet.listeners:
            await two.service.fleet.changed(0.01)
    await other.set_state(SERVING)
    await seen(two, other, serving=True)
    run_on(first)
    texts, _ = await read(stream)
    assert texts == {0: undisturbed()}
    assert other.submits == []
    assert client.num_inflight == 0


async def test_suspect_waits_for_its_own_device(two: Edge) -> None:
    """It may have broken two: a third is not risked while the second comes back."""
    stream = await two.openai.chat.completions.create(**ASK, stream=True)
    first = holder(two)
    other = other_than(two, first)
    await first.set_state(RECOVERING)
    await seen(two, first, serving=False)
    first.offer(DEVICE_LOST, num_crashes=2)
    await offered(two)
    await first.step(3)  # alone, when the device is back: it was innocent
    run_on(first)
    texts, _ = await read(stream)
    assert texts == {0: undisturbed()}
    assert other.submits == []


async def test_serving_replica_is_preferred_to_a_recovering_one(two: Edge) -> None:
    for replica in two.replicas:
        run_on(replica)
    await two.replicas[0].set_state(RECOVERING)
    await seen(two, two.replicas[0], serving=False)
    for _ in range(6):
        await two.openai.chat.completions.create(**ASK)
    assert two.replicas[0].submits == []


async def test_streams_come_to_a_returning_replica_by_and_by(edge: Edge) -> None:
    edge.replica.gated = True
    streams = [
        await edge.openai.chat.completions.create(**ASK, stream=True, seed=seed, temperature=1)
        for seed in range(20)
    ]
    clock = Clock()
    edge.service.fleet.clients[0].admittance.slow_start = SlowStart(clock, first=4, doubling_s=1.0)
    await edge.replica.kill()
    await edge.routable(0)
    edge.replica.submits.clear()
    await edge.replica.start()
    await edge.replica.wait(lambda: len(edge.replica.submits) == 4)
    answer = asyncio.create_task(edge.openai.chat.completions.create(**ASK))  # a new request
    await edge.replica.wait(lambda: len(edge.replica.submits) == 5)
    clock.now += 1.0
    await edge.replica.wait(lambda: len(edge.replica.submits) == 9)
    clock.now += 2.0
    await edge.replica.wait(lambda: len(edge.replica.submits) == 21)
    run_on(edge.replica)
    for texts, _ in await asyncio.gather(*map(read, streams)):
        assert texts == {0: undisturbed()}
    await answer


async def test_new_request_is_refused_and_a_stream_waits_when_the_circuit_is_open(
    edge: Edge,
) -> None:
    clock = Clock()
    client = edge.service.fleet.clients[0]
    settings = BreakerSettings(max_failures=1, cool_down_s=40.0)
    client.admittance.breaker = CircuitBreaker(clock, lambda: 1.0, settings)
    edge.replica.gated = True
    stream = await edge.openai.chat.completions.create(**ASK, stream=True)
    await edge.replica.step(5)
    await edge.replica.break_sessions(ReplicaUnavailable("crash"))
    await edge.routable(0)
    await edge.routable(1)
    with pytest.raises(openai.APIStatusError) as caught:
        await edge.openai.chat.completions.create(**ASK)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "40"
    assert len(edge.replica.submits) == 1
    clock.now += 40.0
    run_on(edge.replica)
    texts, _ = await read(stream)  # the probe
    assert texts == {0: undisturbed()}
    await edge.openai.chat.completions.create(**ASK)


async def test_circuit_opens_when_submits_fail_in_the_replica(two: Edge) -> None:
    bad, good = two.replicas
    bad.refusal = Internal("a defect")
    run_on(good)
    client_of(two, bad).admittance.breaker = CircuitBreaker(Clock(), lambda: 1.0)
    while len(bad.submits) < BreakerSettings().max_failures:
        with contextlib.suppress(openai.InternalServerError):
            await two.openai.chat.completions.create(**ASK)
    for _ in range(4):
        await two.openai.chat.completions.create(**ASK)
    assert len(bad.submits) == BreakerSettings().max_failures
    shown = f'infermesh_replica_circuit_state{{replica="{bad.address}"}} 2.0'
    async with asyncio.timeout(10):  # at the replica's next report
        while shown not in (await two.http.get(f"{two.admin_url}/metrics")).text:
            await two.service.fleet.changed(1.0)


async def test_drain_is_no_failure(edge: Edge) -> None:
    edge.service.fleet.clients[0].admittance.breaker = CircuitBreaker(
        Clock(), lambda: 1.0, BreakerSettings(max_failures=1)
    )
    run_on(edge.replica)
    await edge.replica.break_sessions(Draining("rolled"))
    await edge.routable(0)
    await edge.routable(1)
    await edge.openai.chat.completions.create(**ASK)


async def test_streams_of_a_silent_replica_go_on_at_another(tmp_path: Path) -> None:
    replicas = make_replicas(tmp_path, 2)
    async with running_gateway(tmp_path, replicas, replica_silence_s=1.5) as edge:
        for replica in replicas:
            replica.gated = True
        stream = await edge.openai.chat.completions.create(**ASK, stream=True)
        first = holder(edge)
        other = other_than(edge, first)
        await first.step(5)
        first.reports.clear()
        run_on(other)
        texts, _ = await read(stream)
        assert texts == {0: undisturbed()}
        (submit,) = other.submits
        assert (submit.attempt, submit.num_crashes) == (1, 0)  # silence is no crash
        assert not client_of(edge, first).routable
        await edge.openai.chat.completions.create(**ASK)
        assert len(first.submits) == 1
        first.reports.set()
        await edge.routable(2)  # it is used again
        await first.wait(lambda: first.num_streams == 0)


async def test_replica_that_sends_tokens_is_not_silent(tmp_path: Path) -> None:
    replicas = make_replicas(tmp_path, 2)
    async with running_gateway(tmp_path, replicas, replica_silence_s=0.5) as edge:
        for replica in replicas:
            replica.gated = True
        stream = await edge.openai.chat.completions.create(**ASK, stream=True)
        first = holder(edge)
        first.reports.clear()  # no reports
        loop = asyncio.get_running_loop()
        until = loop.time() + 1.5
        while loop.time() < until:
            await first.step()
            await edge.service.fleet.changed(0.1)
        run_on(first)
        texts, _ = await read(stream)
        assert texts == {0: undisturbed()}
        assert other_than(edge, first).submits == []
