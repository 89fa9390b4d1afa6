"""Requests follow the replica that holds their prefix; replicas come and go under load."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway import metrics
from infermesh.block_hash import BlockHash, extend_hashes, scope_hash, shorten
from infermesh.v1 import scheduler_service_pb2 as pb
from tests.fake_scheduler import FakeScheduler
from tests.fake_stream import words
from tests.gateway_process import Edge, make_replicas, running_gateway
from tests.tiny_tokenizer import byte_level

BLOCK = 4
PROMPT = [5 + i % 300 for i in range(160)]


def blocks_of(prompt: list[int], domain: str = "local") -> list[int]:
    """As a scheduler names them."""
    hashes: list[BlockHash] = []
    extend_hashes(hashes, scope_hash(domain), prompt, BLOCK)
    return list(shorten(hashes))


def snapshot(*stored: int, size: int = BLOCK) -> pb.BlockEvents:
    return pb.BlockEvents(sequence=1, is_snapshot=True, stored=stored, block_size=size)


def change(
    sequence: int, stored: list[int] | None = None, removed: list[int] | None = None
) -> pb.BlockEvents:
    return pb.BlockEvents(
        sequence=sequence, stored=stored or [], removed=removed or [], block_size=BLOCK
    )


def caching(tmp_path: Path, count: int = 2) -> list[FakeScheduler]:
    replicas = make_replicas(tmp_path, count)
    for replica in replicas:
        replica.snapshot = snapshot()
    return replicas


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Edge]:
    """Two replicas that cache blocks, and hold none."""
    async with running_gateway(tmp_path, caching(tmp_path)) as edge:
        yield edge


async def ask(edge: Edge, prompt: list[int] | None = None, **options: Any) -> None:
    wanted: dict[str, Any] = {"model": "tiny", "max_tokens": 3, "temperature": 1.0, **options}
    await edge.openai.completions.create(prompt=prompt or PROMPT, **wanted)


async def knows(edge: Edge, index: int, count: int) -> None:
    """Until the gateway has heard that a replica holds so many blocks."""
    async with asyncio.timeout(10):
        while len(edge.service.fleet.clients[index].prefixes) != count:
            await edge.service.fleet.changed(1.0)


def num_submits(edge: Edge) -> list[int]:
    return [len(replica.submits) for replica in edge.replicas]


def counted() -> tuple[float, float, float]:
    """Hits, misses and matched tokens."""
    hit, miss = (metrics.PREFIX_ROUTED.labels(one) for one in ("hit", "miss"))
    values = [one._value.get() for one in (hit, miss, metrics.PREFIX_MATCHED_TOKENS)]  # type: ignore[attr-defined]
    return values[0], values[1], values[2]


async def test_prompt_goes_to_the_replica_that_reported_its_blocks(two: Edge) -> None:
    await two.replicas[1].report_blocks(change(2, blocks_of(PROMPT)[:30]))
    await knows(two, 1, 30)
    before = counted()
    for _ in range(5):
        await ask(two)
    assert num_submits(two) == [0, 5]
    hits, misses, matched = (now - then for now, then in zip(counted(), before, strict=True))
    assert (hits, misses) == (5, 0)
    assert 5 * 30 * BLOCK <= matched <= 5 * len(PROMPT)


async def test_prompt_follows_when_its_blocks_are_removed_here_and_stored_there(two: Edge) -> None:
    blocks = blocks_of(PROMPT)
    await two.replicas[0].report_blocks(change(2, blocks))
    await knows(two, 0, len(blocks))
    await two.replicas[0].report_blocks(change(3, removed=blocks))
    await two.replicas[1].report_blocks(change(2, blocks))
    await knows(two, 0, 0)
    await knows(two, 1, len(blocks))
    await ask(two)
    assert num_submits(two) == [0, 1]


async def test_burst_of_equal_prefixes_stays_together_before_any_report(two: Edge) -> None:
    await asyncio.gather(*(ask(two, [*PROMPT, i, i]) for i in range(4)))
    assert sorted(num_submits(two)) == [0, 4]


async def test_blocks_of_another_domain_attract_nobody(two: Edge) -> None:
    await two.replicas[1].report_blocks(change(2, blocks_of(PROMPT, "local/alice")))
    await knows(two, 1, 40)
    before = counted()
    await ask(two)
    assert counted()[0] == before[0]
    await ask(two, user="alice")
    assert two.replicas[1].submits[-1].sharing_domain == "local/alice"
    assert counted()[0] == before[0] + 1


async def test_overloaded_holder_loses_to_an_idle_replica(two: Edge) -> None:
    two.replicas[0].num_tokens_waiting = 3 * len(PROMPT)
    await two.replicas[0].report_blocks(change(2, blocks_of(PROMPT)))
    await knows(two, 0, 40)
    await ask(two)
    assert num_submits(two) == [0, 1]


async def test_gateway_opens_the_reports_again_when_one_was_missed(two: Edge) -> None:
    replica = two.replicas[0]
    assert replica.num_watches == 1
    replica.snapshot = snapshot(*blocks_of(PROMPT))
    await replica.report_blocks(change(7, [1, 2, 3]))
    await knows(two, 0, 40)
    assert replica.num_watches == 2
    assert two.service.fleet.clients[0].routable
    await ask(two)
    assert num_submits(two) == [1, 0]


async def test_what_a_lost_replica_held_is_forgotten(two: Edge) -> None:
    await two.replicas[0].report_blocks(change(2, blocks_of(PROMPT)))
    await knows(two, 0, 40)
    await two.replicas[0].kill()
    await two.routable(1)
    await knows(two, 0, 0)
    await ask(two)
    assert num_submits(two) == [0, 1]
    await two.replicas[0].start()


@pytest.mark.parametrize("routing", ["round_robin", "least_loaded"])
async def test_other_policies_heed_no_prefix(tmp_path: Path, routing: str) -> None:
    async with running_gateway(tmp_path, caching(tmp_path), routing=routing) as edge:
        await edge.replicas[1].report_blocks(change(2, blocks_of(PROMPT)))
        await knows(edge, 1, 40)
        before = counted()
        for _ in range(8):
            await ask(edge)
        assert counted() == before
        if routing == "round_robin":
            assert num_submits(edge) == [4, 4]


# come and go


class Load:
    """Streams one after another, several at a time, until it is told to stop."""

    def __init__(self, edge: Edge) -> None:
        self.num_done = 0
        self.failures: list[Exception] = []
        self._edge = edge
        self._stops = False
        self._progress = asyncio.Event()
        self._tasks = [asyncio.ensure_future(self._run(i)) for i in range(4)]

    async def _run(self, number: int) -> None:
        expected = byte_level().decode(words(pb.Submit(), 0)[:40])
        while not self._stops:
            try:
                answer = await self._edge.openai.completions.create(
                    model="tiny", prompt=f"Stream {number}", max_tokens=40, temperature=1.0
                )
                assert answer.choices[0].text == expected
            except Exception as exc:
                self.failures.append(exc)
                return
            self.num_done += 1
            self._progress.set()

    async def go_on_for(self, count: int) -> None:
        wanted = self.num_done + count
        async with asyncio.timeout(20):
            while self.num_done < wanted and not self.failures:
                self._progress.clear()
                await self._progress.wait()

    async def stop(self) -> None:
        self._stops = True
        await asyncio.gather(*self._tasks)
        assert self.failures == []


async def test_replica_is_added_and_another_removed_under_load(tmp_path: Path) -> None:
    first, second = caching(tmp_path)
    file = tmp_path / "replicas"
    file.write_text(f"{first.address}\n")
    settings = {"replicas_file": str(file), "discovery_interval_s": 0.05}
    await first.start()
    await second.start()
    try:
        async with running_gateway(tmp_path, [], wait=False, **settings) as edge:
            await edge.routable(1)
            load = Load(edge)
            await load.go_on_for(8)
            assert second.submits == []
            file.write_text(f"{first.address}\n{second.address}\n")
            await edge.routable(2)
            await load.go_on_for(20)
            file.write_text(f"{second.address}\n")
            await first.wait(lambda: not first._sessions)  # the gateway has hung up
            before = len(first.submits)
            await load.go_on_for(20)
            await load.stop()
            assert len(first.submits) == before
            assert len(second.submits) > 20
            assert first.cancelled == second.cancelled == []
    finally:
        await first.kill()
        await second.kill()


async def test_open_stream_ends_where_it_is_when_its_replica_is_removed(tmp_path: Path) -> None:
    first, second = caching(tmp_path)
    first.gated = True
    file = tmp_path / "replicas"
    file.write_text(first.address)
    settings = {"replicas_file": str(file), "discovery_interval_s": 0.05}
    await first.start()
    await second.start()
    try:
        async with running_gateway(tmp_path, [], wait=False, **settings) as edge:
            await edge.routable(1)
            stream = await edge.openai.completions.create(
                model="tiny", prompt="Hello", max_tokens=20, stream=True
            )
            await first.step(5)
            file.write_text(second.address)
            async with asyncio.timeout(10):
                while [c.address for c in edge.service.fleet.clients] != [second.address]:
                    await edge.service.fleet.changed(1.0)
            first.gated = False
            first._wake.set()
            text = "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])
            assert text == byte_level().decode(words(pb.Submit(), 0)[:20])
            assert second.submits == []
            # nothing is open there any more: the gateway hangs up
            await first.wait(lambda: not first._sessions)
            assert edge.service.fleet._leaving == []
    finally:
        await first.kill()
        await second.kill()


async def test_replica_that_comes_back_before_it_had_left_stays(tmp_path: Path) -> None:
    (replica,) = caching(tmp_path, 1)
    async with running_gateway(tmp_path, [replica]) as edge:
        fleet = edge.service.fleet
        replica.gated = True
        stream = await edge.openai.completions.create(
            model="tiny", prompt="Hello", max_tokens=20, stream=True
        )
        (client,) = fleet.clients
        fleet.update([])
        assert not client.routable
        fleet.update([replica.address])
        assert fleet.clients == [client]
        assert client.routable
        await stream.close()
        await replica.wait(lambda: not replica.num_streams)
        replica.gated = False
        await ask(edge)
        assert len(replica._sessions) == 1


async def test_replica_is_found_by_a_name(tmp_path: Path) -> None:
    replica = FakeScheduler("127.0.0.1:0")
    await replica.start()
    port = replica.address.rpartition(":")[2]
    try:
        settings = {"discovery_interval_s": 0.05, "replicas_file": str(tmp_path / "replicas")}
        async with running_gateway(tmp_path, [], wait=False, **settings) as edge:
            (tmp_path / "replicas").write_text(f"dns:localhost:{port}\n")
            await edge.routable(1)
            await ask(edge)
            assert [c.address for c in edge.service.fleet.clients] == [f"127.0.0.1:{port}"]
            assert len(replica.submits) == 1
    finally:
        await replica.kill()
