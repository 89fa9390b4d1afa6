"""Every process of a mesh is replaced under load, and no client notices."""

import asyncio
import json
from pathlib import Path

from tests.e2e.mesh_process import Mesh, run_infermesh, wait_until
from tests.e2e.steady_load import Load

PROCESSES = {"auth", "cache", "scheduler-0", "scheduler-1", "shard-0", "shard-1", "gateway"}


def billed(tmp_path: Path) -> int:
    """Requests in the ledger; gateways send them in the background."""
    usage = run_infermesh(tmp_path, "usage", "--json")
    return sum(total["requests"] for total in json.loads(usage.stdout))


async def test_no_request_fails_while_every_process_is_replaced(tmp_path: Path) -> None:
    with Mesh(tmp_path, "--engine", "simulated", "--replicas", "2") as mesh:
        wait_until(lambda: len(mesh.facts["services"]) == len(PROCESSES), 60.0)
        load = Load(mesh)
        before = {service["name"]: service["pid"] for service in mesh.facts["services"]}
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load.run())
            await load.began.wait()
            restarted = await asyncio.to_thread(run_infermesh, tmp_path, "restart", timeout_s=120.0)
            load.stopping.set()
        assert restarted.returncode == 0, restarted.stderr
        assert "restarted all processes" in restarted.stdout
        after = {service["name"]: service["pid"] for service in mesh.facts["services"]}
        assert set(after) == PROCESSES
        assert not set(before.values()) & set(after.values())
        assert list(load.outcomes) == ["ok"], load.outcomes
        assert all(len(texts) == 1 for texts in load.texts.values())
        wait_until(lambda: billed(tmp_path) >= load.outcomes["ok"], 20.0)
        assert billed(tmp_path) == load.outcomes["ok"]


def test_restart_says_in_one_sentence_that_no_mesh_runs(tmp_path: Path) -> None:
    refused = run_infermesh(tmp_path, "restart")
    assert refused.returncode == 1
    assert refused.stderr == (
        "error: no mesh runs on this machine; start one with `infermesh up`\n"
    )
