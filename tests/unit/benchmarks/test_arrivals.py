"""Closed and open loops: who asks when, however long answers take."""

import asyncio
import itertools
import random
import statistics
import time

from benchmarks.load import closed_loop, lasting, open_loop
from benchmarks.timeline import Timeline
from benchmarks.workload import Prompt, Workload


class Server:
    """Answers when it is told to, in order; counts who waits."""

    def __init__(self) -> None:
        self.asked: list[Prompt] = []
        self.num_waiting = 0
        self.most_waiting = 0
        self._arrivals = asyncio.Queue[asyncio.Event]()

    async def ask(self, prompt: Prompt, due_s: float) -> Timeline:
        self.asked.append(prompt)
        self.num_waiting += 1
        self.most_waiting = max(self.most_waiting, self.num_waiting)
        answered = asyncio.Event()
        self._arrivals.put_nowait(answered)
        await answered.wait()
        self.num_waiting -= 1
        return Timeline(due_s, ended_s=time.perf_counter())

    async def arrived(self, count: int) -> list[asyncio.Event]:
        """The next requests; each is answered when its event is set."""
        return [await self._arrivals.get() for _ in range(count)]


async def test_closed_loop_has_one_request_per_stream_until_prompts_are_used_up() -> None:
    server, prompts = Server(), Workload().prompts(20)
    async with asyncio.TaskGroup() as tasks:
        load = tasks.create_task(closed_loop(server.ask, iter(prompts), streams=3))
        for _ in prompts:
            (request,) = await server.arrived(1)
            request.set()
    assert server.most_waiting == 3
    assert server.asked == prompts
    assert len(load.result()) == 20


async def test_open_loop_sends_all_when_nobody_answers() -> None:
    server, prompts = Server(), Workload().prompts(50)
    async with asyncio.TaskGroup() as tasks:
        load = tasks.create_task(
            open_loop(server.ask, iter(prompts), per_second=1e5, draw=random.Random(0))
        )
        requests = await server.arrived(50)
        assert server.num_waiting == 50
        assert not load.done()
        for request in requests:
            request.set()
    assert len(load.result()) == 50


async def test_open_loop_is_due_at_drawn_times_whether_it_kept_them_or_not() -> None:
    async def answer_at_once(prompt: Prompt, due_s: float) -> Timeline:
        return Timeline(due_s, ended_s=time.perf_counter())

    prompts = iter(Workload().prompts(2001))
    done = await open_loop(answer_at_once, prompts, per_second=1e5, draw=random.Random(3))
    gaps = [b.due_s - a.due_s for a, b in itertools.pairwise(done)]
    draw = random.Random(3)
    assert all(abs(gap - draw.expovariate(1e5)) < 1e-9 for gap in gaps)
    assert abs(statistics.mean(gaps) * 1e5 - 1) < 0.1
    assert all(one.e2e_s > 0 for one in done[1:])


def test_prompts_end_when_their_time_is_over() -> None:
    assert list(lasting(0.0, Workload().endless())) == []
    first = next(lasting(60.0, Workload().endless()))
    assert first == Workload().prompts(1)[0]
