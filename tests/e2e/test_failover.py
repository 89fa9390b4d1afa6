"""Two replicas, and one of their processes dies or hangs: every feature of a stream goes on."""

import asyncio
import json
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.disturbed import Answer, calls, stream
from tests.e2e.mesh_process import Mesh, run_infermesh, wait_until

TOKENS = 600
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
FAULTS = [("shard", KILL), ("scheduler", KILL), ("shard", STOP), ("scheduler", STOP)]


def all_serve(mesh: Mesh) -> bool:
    """Every replica, as the gateway sees it."""
    with urllib.request.urlopen(f"{mesh.facts['admin_url']}/debug/replicas") as response:
        seen = json.loads(response.read())
    return all(one["routable"] and one["state"] == "serving" for one in seen)


class Reference:
    """A mesh of two replicas and what its streams say undisturbed."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.calls: list[dict[str, object]] = []
        self.answers: list[Answer] = []

    async def prepare(self) -> None:
        """Once: the module's tests compare with the same."""
        if not self.answers:
            self.calls = await calls(self.mesh, TOKENS)
            self.answers = [await stream(self.mesh, call) for call in self.calls]

    def serving(self) -> bool:
        """Both replicas compute."""
        return all_serve(self.mesh)

    def num_failovers(self) -> float:
        """Attempts that were resumed elsewhere, whatever for."""
        try:
            return self.mesh.metric("gateway", "failovers_total")
        except AssertionError:  # none yet
            return 0.0

    def busiest(self) -> int:
        """The replica that runs most of the streams."""
        return max((0, 1), key=lambda i: self.mesh.metric(f"scheduler-{i}", "num_requests_running"))


@pytest.fixture(scope="module")
def two_replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    folder = tmp_path_factory.mktemp("mesh")
    with Mesh(folder, "--dtype", "float32", "--no-cache", "--replicas", "2") as mesh:
        yield Reference(mesh)


def billed(mesh: Mesh) -> tuple[int, int]:
    """Requests and completion tokens in the ledger."""
    totals = json.loads(run_infermesh(mesh.tmp_path, "usage", "--json").stdout)
    return (
        sum(total["requests"] for total in totals),
        sum(total["completion_tokens"] for total in totals),
    )


@pytest.mark.parametrize(("kind", "number"), FAULTS, ids=[f"{k}-{n.name}" for k, n in FAULTS])
async def test_streams_go_on_as_if_nothing_had_happened(
    two_replicas: Reference, kind: str, number: signal.Signals
) -> None:
    reference, mesh = two_replicas, two_replicas.mesh
    await reference.prepare()
    wait_until(reference.serving, 60.0, "both replicas serve")
    before = reference.num_failovers()
    begun = [asyncio.Event() for _ in reference.calls]
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(stream(mesh, call, event))
            for call, event in zip(reference.calls, begun, strict=True)
        ]
        await asyncio.gather(*(event.wait() for event in begun))
        victim = f"{kind}-{reference.busiest()}"
        pid = mesh.kill(victim, number)
    answers = [task.result() for task in running]
    if number is STOP:
        mesh.kill(victim, signal.SIGCONT)
    else:
        mesh.wait_restarted(victim, pid)
    for seen, expected in zip(answers, reference.answers, strict=True):
        assert seen.same_as(expected)
    assert reference.num_failovers() > before
    assert max(answer.longest_gap_s for answer in answers) < 30.0
    wait_until(reference.serving, 60.0, "the victim is used again")
    for index in (0, 1):
        wait_until(lambda i=index: mesh.metric(f"scheduler-{i}", "num_blocks_used") == 0, 20.0)  # type: ignore[misc]


async def test_answers_were_billed_once(two_replicas: Reference) -> None:
    reference, mesh = two_replicas, two_replicas.mesh
    await reference.prepare()
    # what earlier tests used may still be on its way to the ledger
    billable = mesh.metric("gateway", "billed_completion_tokens_total")
    wait_until(lambda: billed(mesh)[1] == billable, 20.0, "all that was used is billed")
    before = billed(mesh)
    wait_until(reference.serving, 60.0, "both replicas serve")
    begun = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(stream(mesh, call, begun)) for call in reference.calls]
        await begun.wait()
        mesh.kill(f"shard-{reference.busiest()}")
    used = sum(task.result().usage["completion"] for task in running)
    wait_until(lambda: billed(mesh)[0] >= before[0] + len(running), 20.0)
    assert billed(mesh) == (before[0] + len(running), before[1] + used)


# No output has it: the simulated engine says words of letters.
POISON = 25


@pytest.fixture(scope="module")
def rehearsing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Two simulated replicas whose device dies of one token."""
    tmp_path = tmp_path_factory.mktemp("rehearsing")
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"fixed_us": 20_000, "exit_token_id": POISON}))
    flags = ("--no-cache", "--no-auth", "--engine", "simulated", "--replicas", "2")
    with Mesh(tmp_path, *flags, "--set", f"shard.simulated_profile={profile}") as mesh:
        yield mesh


async def innocent(mesh: Mesh, seed: int, begun: asyncio.Event) -> str:
    text = ""
    async with mesh.async_openai(max_retries=0, timeout=120) as client:
        async for chunk in await client.completions.create(
            model=mesh.model, prompt="Any", temperature=1, seed=seed, max_tokens=150, stream=True
        ):
            text += chunk.choices[0].text if chunk.choices else ""
            begun.set()
    return text


async def poisonous(mesh: Mesh) -> str | None:
    """How it ended."""
    async with mesh.async_openai(max_retries=0, timeout=120) as client:
        try:
            await client.completions.create(
                model=mesh.model, prompt=[40, POISON, 41], max_tokens=20
            )
        except openai.APIStatusError as error:
            return error.code
    return None


@pytest.mark.slow
async def test_poisonous_request_ends_and_a_hundred_innocent_ones_lose_nothing(
    rehearsing: Mesh,
) -> None:
    mesh = rehearsing
    rounds, outcome = [], None
    for has_poison in (False, True):
        begun = [asyncio.Event() for _ in range(100)]
        async with asyncio.TaskGroup() as tasks:
            asking = [tasks.create_task(innocent(mesh, i, one)) for i, one in enumerate(begun)]
            await asyncio.gather(*(event.wait() for event in begun))
            if has_poison:
                outcome = await poisonous(mesh)
        rounds.append([task.result() for task in asking])
    assert outcome == "poisoned"
    assert rounds[0] == rounds[1]
    assert mesh.metric("gateway", "failovers_total", reason="moved_device_lost") > 0
    for index in (0, 1):  # it was in flight at both
        moved = mesh.metric(f"scheduler-{index}", "requests_moved_total", reason="device_lost")
        assert moved > 0


async def test_streams_move_on_when_their_replica_drains(rehearsing: Mesh) -> None:
    mesh = rehearsing
    wait_until(lambda: all_serve(mesh), 60.0, "both replicas serve")
    undisturbed = await asyncio.gather(*(innocent(mesh, i, asyncio.Event()) for i in range(12)))
    begun = [asyncio.Event() for _ in undisturbed]
    async with asyncio.TaskGroup() as tasks:
        asking = [tasks.create_task(innocent(mesh, i, one)) for i, one in enumerate(begun)]
        await asyncio.gather(*(event.wait() for event in begun))
        pid = mesh.kill("scheduler-0", signal.SIGTERM)
        await asyncio.to_thread(mesh.wait_restarted, "scheduler-0", pid)
    assert [task.result() for task in asking] == undisturbed
    assert mesh.metric("gateway", "failovers_total", reason="moved_draining") > 0


@pytest.mark.slow
async def test_wedged_shard_is_restarted_when_nobody_continues_it(tmp_path: Path) -> None:
    flags = ("--no-cache", "--no-auth", "--engine", "simulated")
    keepalive = ("--set", "gateway.keepalive_s=0.5")
    with Mesh(tmp_path, *flags, *keepalive) as mesh:
        call = {
            "messages": [{"role": "user", "content": "Go on"}],
            "temperature": 1.0,
            "seed": 3,
            "max_tokens": 400,
            "extra_body": {"ignore_eos": True},
        }
        undisturbed = await stream(mesh, call)
        begun = asyncio.Event()
        running = asyncio.create_task(stream(mesh, call, begun))
        await begun.wait()
        pid = mesh.kill("shard-0", signal.SIGSTOP)
        seen = await running
        assert seen.same_as(undisturbed)
        assert mesh.service("shard-0")["pid"] != pid
        assert mesh.metric("scheduler-0", "shard_stalls_total") == 1
