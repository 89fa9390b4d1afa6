"""The previous version and this one in one mesh: each beside the other, and on the way between.

The previous one is real code in real processes, see tests/skew.
"""

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

import infermesh
from infermesh import Client
from infermesh.v1 import shard_service_pb2, shard_service_pb2_grpc
from tests.e2e.mesh_process import ROOT, Mesh, environment, run_infermesh, wait_until
from tests.e2e.steady_load import Load
from tests.skew.previous import MODULES, Installation

PROMPT = "The previous version and this one"
# Asks as a backend does that was not upgraded, or was before its mesh.
ASK = f"""
import sys
from infermesh import Client
with Client(sys.argv[1], sys.argv[2]) as client:
    options = dict(temperature=1.0, seed=7, max_tokens=30, top_logprobs=2, n=2)
    texts = ["", ""]
    for delta in client.generate({PROMPT!r}, **options):
        texts[delta.index] += delta.text
    print(texts, client.usage.completion_tokens, file=open(sys.argv[3], "w"))
"""
# Between them they have every arrow of the map with the previous version at either end.
ALTERNATING = {
    "gateway and shard are new": ("services.auth", "services.cache", "services.scheduler"),
    "gateway and shard are old": ("gateway", "services.shard"),
}


def ask_over_grpc(mesh: Mesh, installed: Path, tmp_path: Path) -> str:
    """What a client of the version at `installed` is answered."""
    answer = tmp_path / "answer.txt"
    command = (sys.executable, "-c", ASK, mesh.facts["grpc"], mesh.facts["api_key"], str(answer))
    env = environment(tmp_path) | {"PYTHONPATH": str(installed)}
    subprocess.run(command, env=env, check=True, timeout=60, cwd=tmp_path)
    return answer.read_text()


def replicas(mesh: Mesh) -> list[dict[str, Any]]:
    """As the gateway's admin port tells of them."""
    url = f"{mesh.facts['admin_url']}/debug/replicas"
    found: list[dict[str, Any]] = httpx.get(url, timeout=10).json()
    return found


def versions(mesh: Mesh) -> dict[str, str]:
    """As scheduler and shard say; the previous version does not."""
    (replica,) = replicas(mesh)
    address = replica["address"].replace("scheduler-0", "shard-0")
    with grpc.insecure_channel(address) as channel:
        stub = shard_service_pb2_grpc.ShardServiceStub(channel)
        described = stub.Describe(shard_service_pb2.DescribeRequest(), timeout=10)
    return {"scheduler": replica.get("version") or "", "shard": described.version}


def cached(mesh: Mesh) -> str:
    """Whether the cache had the answer, as the gateway says it."""
    body = {"model": mesh.model, "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    url = f"{mesh.facts['url']}/v1/completions"
    answer = httpx.post(url, json=body, headers=dict(mesh.bearer), timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.headers["infermesh-cache"]


@pytest.mark.parametrize("previous", ALTERNATING.values(), ids=ALTERNATING.keys())
def test_neighbours_of_two_versions_serve_every_feature(
    tmp_path: Path, previous: Sequence[str]
) -> None:
    installed = Installation(tmp_path)
    installed.install(previous)
    with Mesh(tmp_path, "--engine", "simulated", python_path=installed.path) as mesh:
        is_old = {name: f"services.{name}" in previous for name in ("scheduler", "shard")}
        told = versions(mesh)
        if "gateway" in previous:  # it does not read what the new scheduler says
            del told["scheduler"]
        assert told == {name: "" if is_old[name] else infermesh.__version__ for name in told}
        here = Path(infermesh.__file__).parents[1]
        new, old = (ask_over_grpc(mesh, at, tmp_path) for at in (here, installed.previous))
        assert new == old
        assert new.endswith(" 60\n")  # two choices of 30 tokens
        wait_until(lambda: cached(mesh) == "hit", 30.0, "the second is a hit")
        with Client(mesh.facts["grpc"], mesh.facts["api_key"]) as client:
            assert client.count_tokens(PROMPT) > 0
        wait_until(lambda: billed(tmp_path) >= 4, 20.0)


@pytest.mark.slow
@pytest.mark.parametrize("goes_back", [False, True])
async def test_no_request_fails_while_a_mesh_is_upgraded_and_rolled_back(
    tmp_path: Path, goes_back: bool
) -> None:
    installed = Installation(tmp_path)
    installed.install(MODULES)
    ways = [[], may_go_back(installed.previous)] if goes_back else [[]]
    # a busy machine's clients may take longer than two seconds to ask once more
    patience = ("--set", "gateway.hand_over_s=20")
    flags = ("--engine", "simulated", "--replicas", "2", *patience)
    with Mesh(tmp_path, *flags, python_path=installed.path) as mesh:
        load = Load(mesh)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load.run())
            await load.began.wait()
            for previous in ways:
                installed.install(previous)
                done = await asyncio.to_thread(run_infermesh, tmp_path, "restart", timeout_s=120.0)
                assert done.returncode == 0, done.stderr
            load.stopping.set()
        # the previous gateway does not say it
        version = None if goes_back else infermesh.__version__
        assert [one.get("version") for one in replicas(mesh)] == [version] * 2
        assert list(load.outcomes) == ["ok"], load.outcomes
        assert all(len(texts) == 1 for texts in load.texts.values())
        wait_until(lambda: billed(tmp_path) >= load.outcomes["ok"], 20.0)
        assert billed(tmp_path) == load.outcomes["ok"]


@pytest.mark.slow
def test_up_says_what_to_upgrade_when_a_scheduler_speaks_another_protocol(tmp_path: Path) -> None:
    later = tmp_path / "later"
    for package in ("infermesh", "services"):
        shutil.copytree(ROOT / package, later / package)
    version = later / "infermesh" / "version.py"
    version.write_text(version.read_text().replace("PROTOCOL = 1", "PROTOCOL = 99"))
    installed = Installation(tmp_path)
    installed.install((), {"services.scheduler": later})
    mesh = Mesh(tmp_path, "--engine", "simulated", "--no-cache", python_path=installed.path)
    try:
        assert mesh.process.wait(120) == 1, mesh.logs()
    finally:
        mesh.close()
    said = mesh.output.read_text()
    assert "which speaks protocols 99 to 99; its caller is version" in said
    assert "which speaks 1 to 1: upgrade the caller first" in said


def may_go_back(previous: Path) -> list[str]:
    """All, but auth only where its database is as before: see docs/upgrading.md."""
    folder = Path("services/auth/migrations/versions")
    old, new = ({f.name for f in (at / folder).glob("0*.py")} for at in (previous, ROOT))
    return [name for name in MODULES if name != "services.auth" or old == new]


def billed(tmp_path: Path) -> int:
    """Requests in the ledger."""
    usage = run_infermesh(tmp_path, "usage", "--json")
    return sum(total["requests"] for total in json.loads(usage.stdout))
