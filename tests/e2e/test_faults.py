"""Processes are killed in mid-stream; the streams go on as if nothing had happened."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.mesh_process import Mesh

TOKENS = 400


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Mesh(tmp_path_factory.mktemp("mesh"), "--dtype", "float32", "--no-cache") as running:
        yield running


def long_chat(mesh: Mesh, index: int, seed: int | None) -> dict[str, object]:
    """A stream long enough to be killed in its middle; reuse would hide the fault."""
    sampling = {"temperature": 0} if seed is None else {"temperature": 1.0, "seed": seed}
    return {
        "model": mesh.model,
        "messages": [{"role": "user", "content": f"Count from {index} to {index + 30}"}],
        "max_tokens": TOKENS,
        "stream": True,
        "extra_body": {"ignore_eos": True},
        **sampling,
    }


def collect(mesh: Mesh, call: dict[str, object], started: threading.Event, out: list[str]) -> None:
    text = ""
    for chunk in mesh.openai(max_retries=0).chat.completions.create(**call):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        if len(text) > 40:
            started.set()
    out.append(text)


@pytest.mark.parametrize(
    ("victim", "seed"),
    [
        pytest.param("shard-0", 11, id="shard-0-seeded"),
        pytest.param("scheduler-0", None, id="scheduler-0-greedy"),
        pytest.param("shard-0", None, id="shard-0-greedy", marks=pytest.mark.slow),
        pytest.param("scheduler-0", 11, id="scheduler-0-seeded", marks=pytest.mark.slow),
    ],
)
def test_stream_equals_an_undisturbed_run_when_a_process_is_killed(
    mesh: Mesh, victim: str, seed: int | None
) -> None:
    call = long_chat(mesh, 3, seed)
    undisturbed: list[str] = []
    collect(mesh, call, threading.Event(), undisturbed)
    started = threading.Event()
    disturbed: list[str] = []
    reader = threading.Thread(target=collect, args=(mesh, call, started, disturbed))
    reader.start()
    assert started.wait(60)
    pid = mesh.kill(victim)
    reader.join(120)
    mesh.wait_restarted(victim, pid)
    assert disturbed == undisturbed
    assert mesh.metric("scheduler-0", "num_blocks_used") == 0


@pytest.mark.slow
def test_several_streams_go_on_when_the_shard_is_killed(mesh: Mesh) -> None:
    calls = [long_chat(mesh, index, 5 + index) for index in range(4)]
    expected: list[str] = []
    for call in calls:
        collect(mesh, call, threading.Event(), expected)
    results: list[list[str]] = [[] for _ in calls]
    started = [threading.Event() for _ in calls]
    readers = [
        threading.Thread(target=collect, args=(mesh, call, event, out))
        for call, event, out in zip(calls, started, results, strict=True)
    ]
    for reader in readers:
        reader.start()
    assert all(event.wait(60) for event in started)
    pid = mesh.kill("shard-0")
    for reader in readers:
        reader.join(120)
    mesh.wait_restarted("shard-0", pid)
    assert [text for out in results for text in out] == expected


@pytest.mark.slow
def test_streams_move_to_the_other_replica_when_a_scheduler_is_killed(tmp_path: Path) -> None:
    with Mesh(tmp_path, "--dtype", "float32", "--no-cache", "--replicas", "2") as mesh:
        call = long_chat(mesh, 1, None)
        expected: list[str] = []
        collect(mesh, call, threading.Event(), expected)
        started = [threading.Event() for _ in range(4)]
        results: list[list[str]] = [[] for _ in started]
        calls = [long_chat(mesh, 1, None) | {"user": str(i)} for i in range(4)]
        readers = [
            threading.Thread(target=collect, args=(mesh, one, event, out))
            for one, event, out in zip(calls, started, results, strict=True)
        ]
        for reader in readers:
            reader.start()
        assert all(event.wait(60) for event in started)
        mesh.kill("scheduler-0")
        mesh.kill("shard-1")
        for reader in readers:
            reader.join(120)
        assert results == [expected] * 4
