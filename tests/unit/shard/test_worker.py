"""The worker thread: order, idle time, and what survives a failing job."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from infermesh.errors import Internal
from services.shard.worker import Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    worker.start()
    yield worker
    assert worker.stop(10.0)


def _wait(worker: Worker) -> None:
    done = threading.Event()
    worker.submit(done.set)
    assert done.wait(10.0)


def test_worker_runs_jobs_in_order_on_one_thread_when_many_are_queued(worker: Worker) -> None:
    seen: list[tuple[int, int]] = []
    for i in range(50):
        worker.submit(lambda i=i: seen.append((i, threading.get_ident())))  # type: ignore[misc]
    _wait(worker)
    assert [i for i, _ in seen] == list(range(50))
    assert len({thread for _, thread in seen}) == 1


def test_worker_goes_on_when_a_job_raises(worker: Worker) -> None:
    worker.submit(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    _wait(worker)


def test_worker_counts_no_idle_time_when_jobs_were_waiting() -> None:
    times = iter(range(1000))
    worker = Worker(now_s=lambda: float(next(times)))
    idle: list[float] = []
    for _ in range(3):
        worker.submit(lambda: idle.append(worker.take_idle_s()))
    worker.start()
    _wait(worker)
    assert idle == [0.0, 0.0, 0.0]
    assert worker.stop(10.0)


def test_worker_gives_its_idle_time_once_when_a_job_arrives_late(worker: Worker) -> None:
    idle: list[float] = []
    _wait(worker)
    worker.submit(lambda: idle.extend([worker.take_idle_s(), worker.take_idle_s()]))
    _wait(worker)
    assert idle[0] > 0
    assert idle[1] == 0


def test_worker_refuses_a_job_when_its_queue_is_full() -> None:
    worker = Worker()  # never started
    for _ in range(1024):
        worker.submit(lambda: None)
    with pytest.raises(Internal, match="1024 jobs"):
        worker.submit(lambda: None)
