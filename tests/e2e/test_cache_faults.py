"""The cache as a process that is killed, stopped, damaged or late: hits are lost, no answer is."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.mesh_process import Mesh, wait_until
from tests.e2e.test_cache import CAPITAL, PATIENT, ask, keep, outcome, reason, said, wait_embedder


def restart_cache(mesh: Mesh, change: Callable[[], None] = lambda: None) -> None:
    """kill -9 and a new process, with a change of its files between the two."""
    connected = "cache_connected"
    pid = mesh.kill("cache")
    change()
    mesh.wait_restarted("cache", pid)
    wait_until(lambda: mesh.metric("gateway", connected) == 1, 60, "the cache is found again")


@pytest.fixture
def own_mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path, "--dtype", "float32", *PATIENT) as running:
        wait_embedder(running)
        yield running


def log_file(mesh: Mesh) -> Path:
    return max((mesh.tmp_path / "state/infermesh/cache").glob("*.log"))


def test_requests_go_on_when_the_cache_is_killed_and_its_entries_come_back(own_mesh: Mesh) -> None:
    mesh = own_mesh
    keep(mesh, CAPITAL)
    failures: list[BaseException] = []
    outcomes: list[str] = []
    done = threading.Event()

    def load() -> None:
        number = 0
        while not done.is_set():
            number += 1
            try:
                outcomes.append(outcome(ask(mesh, f"What is {number} plus 2?", max_tokens=8)))
            except BaseException as exc:
                failures.append(exc)

    clients = [threading.Thread(target=load) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        wait_until(lambda: len(outcomes) > 4, 60)
        restart_cache(mesh)
        wait_until(lambda: outcome(ask(mesh, CAPITAL)) == "hit", 30, "the entry is back")
    finally:
        done.set()
        for client in clients:
            client.join(60)
    assert failures == []
    wait_embedder(mesh)
    hit = ask(mesh, "Which city is the capital of France?")
    assert (outcome(hit), reason(hit)) == ("hit", "same_meaning")


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
@pytest.mark.slow
def test_damaged_log_loses_one_entry_at_most(own_mesh: Mesh, damage: str) -> None:
    mesh = own_mesh
    questions = [CAPITAL, "Name a colour", "Who are you?"]
    answers = {text: said(keep(mesh, text)) for text in questions}

    def hurt() -> None:
        path = log_file(mesh)
        data = bytearray(path.read_bytes())
        if damage == "truncated":
            del data[-5:]
        else:
            data[len(data) // 2] ^= 0x10
        path.write_bytes(data)

    restart_cache(mesh, hurt)
    found = [outcome(ask(mesh, text)) for text in questions]
    assert found.count("hit") >= len(questions) - 1
    for text in questions:  # fresh or kept, it is the same answer
        assert said(ask(mesh, text)) == answers[text]


@pytest.mark.slow
def test_hanging_cache_costs_no_error(tmp_path: Path) -> None:
    with Mesh(tmp_path, "--dtype", "float32") as mesh:
        wait_embedder(mesh)
        keep(mesh, CAPITAL)
        pid = mesh.service("cache")["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            took = []
            for _ in range(6):
                began = time.monotonic()
                answer = ask(mesh, CAPITAL)
                took.append(time.monotonic() - began)
                assert outcome(answer) == "miss"
                assert "Paris" in said(answer)
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: outcome(ask(mesh, CAPITAL)) == "hit", 30, "the cache answers again")


@pytest.mark.slow
def test_mesh_answers_before_its_cache_is_there(tmp_path: Path) -> None:
    with Mesh(tmp_path, "--dtype", "float32") as mesh:
        assert "Paris" in said(ask(mesh, CAPITAL))
        wait_embedder(mesh)
        assert "cache" in [service["name"] for service in mesh.facts["services"]]
