"""A mesh that speaks mutual TLS, from outside: it answers, it refuses, and its certificates change
under load.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from infermesh.errors import MeshError, PermissionDenied, Unavailable, from_rpc_error
from infermesh.rpc import as_server
from infermesh.security.certificates import channel_credentials
from infermesh.security.identities import Identity
from tests import certificates
from tests.e2e.faults import kill, usable
from tests.e2e.mesh_process import DEMO_MODEL, Mesh, environment, run_infermesh, wait_until
from tests.e2e.steady_load import Load

CALL_S = 10.0
HEALTH = "/grpc.health.v1.Health/Check"
# process, which of its addresses, an RPC, who may not call it
DOORS = [
    ("auth", "address", "/infermesh.v1.AuthService/Authenticate", Identity.CACHE),
    ("auth", "admin_address", "/infermesh.v1.AuthAdminService/ListTenants", Identity.GATEWAY),
    ("cache", "address", "/infermesh.v1.SemanticCacheService/GetEmbedder", Identity.SCHEDULER),
    ("cache", "address", "/infermesh.v1.SemanticCacheAdminService/GetStats", Identity.GATEWAY),
    ("scheduler-0", "address", "/infermesh.v1.SchedulerService/Drain", Identity.GATEWAY),
    ("shard-0", "address", "/infermesh.v1.ShardService/Describe", Identity.GATEWAY),
]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    flags = ("--tls", "--engine", "simulated", "--replicas", "2", "--set", "cache.embedder=none")
    with Mesh(folder, *flags) as running:
        wait_until(lambda: len(running.facts["services"]) == 7, 60.0)
        yield running


@pytest.fixture(scope="module")
def folder(mesh: Mesh) -> Path:
    """Where `up --tls` keeps its certificates."""
    return mesh.tmp_path / "state" / "infermesh" / "tls"


def showing(mesh: Mesh, name: str, door: str, folder: Path) -> grpc.Channel:
    """A channel to a process, with the certificate in a folder."""
    credentials = channel_credentials(certificates.material(folder))
    identity = Identity(name.partition("-")[0])
    return grpc.secure_channel(mesh.service(name)[door], credentials, options=as_server(identity))


def failure(channel: grpc.Channel, method: str) -> MeshError | None:
    """What an empty request to it fails with."""
    with channel:
        try:
            channel.unary_unary(method)(b"", timeout=CALL_S)
        except grpc.RpcError as error:
            return from_rpc_error(error)
    return None


def test_mesh_answers_over_mutual_tls(mesh: Mesh) -> None:
    answer = mesh.openai().chat.completions.create(
        model=mesh.model,
        temperature=0,
        max_tokens=8,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
    )
    assert answer.choices[0].message.content
    wait_until(lambda: mesh.metric("gateway", "cache_connected") == 1, 10.0)


def test_posture_is_said_by_up_and_by_every_process(mesh: Mesh) -> None:
    said = mesh.output.read_text()
    assert "security: asks for API keys · mutual TLS between services · this machine alone" in said
    logs = {path.stem: path.read_text() for path in mesh.tmp_path.glob("state/*/logs/*/*.log")}
    assert set(logs) == {service["name"] for service in mesh.facts["services"]}
    for name, text in logs.items():
        assert f'"mtls": "on, as {name.partition("-")[0]}"' in text, name


@pytest.mark.parametrize(("name", "door", "method", "identity"), DOORS)
def test_service_refuses_plaintext_and_a_wrong_identity(
    mesh: Mesh, folder: Path, name: str, door: str, method: str, identity: Identity
) -> None:
    plaintext = grpc.insecure_channel(mesh.service(name)[door])
    assert isinstance(failure(plaintext, method), Unavailable)
    wrong = showing(mesh, name, door, folder / identity.value)
    assert isinstance(failure(wrong, method), PermissionDenied)
    anybody = showing(mesh, name, door, folder / identity.value)
    assert failure(anybody, HEALTH) is None
    refusals = mesh.metric(name, "rpc_refusals_total", method=method, identity=identity.value)
    assert refusals == 1


def test_command_line_is_the_operator(mesh: Mesh) -> None:
    done = run_infermesh(mesh.tmp_path, "tenants", "list")
    assert done.returncode == 0, done.stderr
    assert "local" in done.stdout


def test_every_process_tells_when_its_certificate_expires(mesh: Mesh) -> None:
    name = "tls_certificate_expires_timestamp_seconds"
    assert len({mesh.metric(s["name"], name) for s in mesh.facts["services"]}) == 1


@pytest.mark.slow
async def test_no_request_fails_while_the_authority_is_replaced(mesh: Mesh, folder: Path) -> None:
    old = Path(shutil.copytree(folder / "gateway", mesh.tmp_path / "old"))
    undisturbed = mesh.service("scheduler-1")["pid"]
    load = Load(mesh)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load.run())
        await load.began.wait()
        await asyncio.to_thread(replace_authority_and_reconnect, mesh)
        load.stopping.set()
    assert set(load.outcomes) == {"ok"}, load.outcomes
    assert all(len(texts) == 1 for texts in load.texts.values())
    # one that was never restarted believes the new authority alone
    assert mesh.service("scheduler-1")["pid"] == undisturbed
    shutil.copy(folder / "gateway" / "ca.crt", old / "ca.crt")
    before = showing(mesh, "scheduler-1", "address", old)
    assert isinstance(failure(before, HEALTH), Unavailable)
    after = showing(mesh, "scheduler-1", "address", folder / "gateway")
    assert failure(after, HEALTH) is None


def replace_authority_and_reconnect(mesh: Mesh) -> None:
    """All steps, and then new connections: who is killed comes back believing the new one alone."""
    for step in ("--new-authority", "--renew", "--forget-old-authority"):
        done = run_infermesh(mesh.tmp_path, "certs", step)
        assert done.returncode == 0, done.stderr
    for name in ("scheduler-0", "shard-0", "cache", "auth"):
        kill(mesh, name)
        wait_until(lambda: usable(mesh, 0), 60.0, f"replica 0 after {name}")


def free_port() -> int:
    """One that nobody has at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


@contextlib.contextmanager
def process(folder: Path, module: str, **settings: str) -> Iterator[dict[str, Any]]:
    """A service as a container runs it, and what it announced; settings as section__name."""
    announced = folder / f"{module}.json"
    flags = [f"--{name.replace('__', '.')}={value}" for name, value in settings.items()]
    flags += [f"--security.tls_folder={folder / 'tls'}", f"--telemetry.announce_file={announced}"]
    log = (folder / f"{module}.log").open("w")
    running = subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        cwd=folder, env=environment(folder), stdout=log, stderr=log,
    )  # fmt: skip
    try:
        wait_until(lambda: announced.exists() or running.poll() is not None, 60.0)
        assert announced.exists(), Path(log.name).read_text()
        yield json.loads(announced.read_text())
    finally:
        running.terminate()
        assert running.wait(30) == 0
        log.close()


def test_services_find_each_other_by_name_over_tcp(tmp_path: Path) -> None:
    certificates.make(tmp_path / "tls")
    shard, scheduler = (f"127.0.0.1:{free_port()}" for _ in range(2))
    gateway = {
        "gateway__http_address": "127.0.0.1:0",
        "gateway__admin_address": "127.0.0.1:0",
        "gateway__grpc_address": "127.0.0.1:0",
        "gateway__replicas": f"dns:localhost:{scheduler.rpartition(':')[2]}",
    }
    model = {"scheduler__model": str(DEMO_MODEL), "scheduler__model_id": "demo"}
    with (
        process(tmp_path, "services.shard", shard__address=shard, shard__engine="simulated"),
        process(
            tmp_path, "services.scheduler", scheduler__address=scheduler,
            scheduler__shard=shard, **model,
        ),
        process(tmp_path, "gateway", **gateway) as facts,
        httpx.Client(base_url=f"http://{facts['http_address']}", timeout=30.0) as client,
    ):  # fmt: skip
        wait_until(lambda: bool(client.get("/v1/models").json()["data"]), 60.0)
        asked = {"model": "demo", "prompt": "Anything", "max_tokens": 4}
        assert client.post("/v1/completions", json=asked).json()["usage"]["completion_tokens"] == 4
        with grpc.insecure_channel(shard) as plaintext:
            assert isinstance(failure(plaintext, HEALTH), Unavailable)


def test_service_does_not_start_where_others_could_read_along(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.scheduler", "--scheduler.address=0.0.0.0:0"],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: scheduler.address is 0.0.0.0:0")
    assert "security.allow=plaintext" in done.stderr
    assert len(done.stderr.splitlines()) == 1
