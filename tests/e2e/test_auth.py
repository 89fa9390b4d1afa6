"""Tenants, keys, limits and usage on a mesh of real processes, which get killed."""

import asyncio
import contextlib
import functools
import itertools
import json
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.mesh_process import Mesh, environment, run_infermesh, wait_until
from tests.postgres import Postgres

# Who may and what it cost is the same whatever computes the answer.
LIGHT = ("--engine", "simulated", "--no-cache")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Mesh(tmp_path_factory.mktemp("mesh"), *LIGHT) as running:
        yield running


def command(mesh: Mesh, *words: str) -> str:
    """A command as the mesh's user types it; what it printed."""
    done = run_infermesh(mesh.tmp_path, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def make_tenant(mesh: Mesh, tenant: str, *limits: str) -> str:
    """A tenant's first key."""
    command(mesh, "tenants", "create", tenant, *limits)
    return command(mesh, "keys", "create", "--tenant", tenant)


def usage(mesh: Mesh, tenant: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(command(mesh, "usage", "--tenant", tenant, "--json"))
    return rows


def usage_of(mesh: Mesh, tenant: str, num_requests: int) -> list[dict[str, Any]]:
    """The ledger, once it has so many rows."""
    wait_until(lambda: sum(row["requests"] for row in usage(mesh, tenant)) >= num_requests, 30)
    return usage(mesh, tenant)


def id_of(api_key: str) -> str:
    return api_key.split("-")[1]


def ask(mesh: Mesh, api_key: str, **options: Any) -> Any:
    call = {"model": mesh.model, "messages": QUESTION, "max_tokens": 8, "temperature": 1.0}
    with mesh.openai(max_retries=0) as client:
        keyed = client.with_options(api_key=api_key)
        return keyed.chat.completions.create(**{**call, **options})


def test_two_tenants_with_three_keys_are_billed_what_their_clients_received(mesh: Mesh) -> None:
    acme = make_tenant(mesh, "acme")
    keys = [acme, command(mesh, "keys", "create", "--tenant", "acme"), make_tenant(mesh, "globex")]
    received: dict[str, list[int]] = {id_of(key): [0, 0, 0] for key in keys}
    for index, key in enumerate(keys * 3):
        got = ask(mesh, key, max_tokens=3 + index).usage
        for slot, value in enumerate((1, got.prompt_tokens, got.completion_tokens)):
            received[id_of(key)][slot] += value
    rows = usage_of(mesh, "acme", 6) + usage_of(mesh, "globex", 3)
    assert {
        row["key"]: [row["requests"], row["prompt_tokens"], row["completion_tokens"]]
        for row in rows
    } == received


def test_wrong_expired_and_revoked_keys_are_refused(mesh: Mesh) -> None:
    good = make_tenant(mesh, "keys")
    short = command(mesh, "keys", "create", "--tenant", "keys", "--expires", "3s")
    ask(mesh, good)
    with pytest.raises(openai.AuthenticationError):
        ask(mesh, good[:-1] + ("a" if good[-1] != "a" else "b"))
    expired = refusal(mesh, short, 20)
    assert "expired" in expired.message
    command(mesh, "keys", "revoke", id_of(good))
    assert "revoked" in refusal(mesh, good, 1).message
    listed = command(mesh, "keys", "list", "--tenant", "keys")
    assert "revoked" in listed
    assert "expired" in listed
    assert good not in listed


def refusal(mesh: Mesh, api_key: str, within_s: float) -> openai.AuthenticationError:
    caught: list[openai.AuthenticationError] = []

    def refused() -> bool:
        try:
            ask(mesh, api_key, max_tokens=1)
        except openai.AuthenticationError as error:
            caught.append(error)
        return bool(caught)

    wait_until(refused, within_s)
    return caught[0]


def test_rotated_key_works_beside_the_new_one(mesh: Mesh) -> None:
    old = make_tenant(mesh, "rotating")
    new = command(mesh, "keys", "rotate", id_of(old), "--overlap", "1h")
    ask(mesh, old)
    ask(mesh, new)


def lists_models(mesh: Mesh, url: str) -> bool:
    answer = httpx.get(f"{url}/v1/models", headers=dict(mesh.bearer))
    return bool(answer.json()["data"])


@contextlib.contextmanager
def more_gateways(mesh: Mesh, folder: Path, count: int, auth: str = "") -> Iterator[list[str]]:
    """URLs of further gateways in front of the same scheduler, and auth service if not others."""
    processes, urls = [], []
    try:
        for index in range(count):
            announced = folder / f"gateway-{index}.json"
            settings = {
                "gateway.http_address": "127.0.0.1:0",
                "gateway.admin_address": "127.0.0.1:0",
                "gateway.grpc_address": "127.0.0.1:0",
                "gateway.replicas": mesh.service("scheduler-0")["address"],
                "gateway.auth": auth or mesh.service("auth")["address"],
                "gateway.usage_dir": str(folder / f"usage-{index}"),
                "telemetry.announce_file": str(announced),
            }
            flags = [f"--{name}={value}" for name, value in settings.items()]
            with (folder / f"gateway-{index}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "gateway", *flags],
                        env=environment(folder),
                        stdout=log,
                        stderr=log,
                    )
                )
            wait_until(announced.exists, 60)
            urls.append(f"http://{json.loads(announced.read_text())['http_address']}")
        for url in urls:
            wait_until(functools.partial(lists_models, mesh, url), 30)
        yield urls
    finally:
        for process in processes:
            process.terminate()
            process.wait(30)


async def burst(
    mesh: Mesh, api_key: str, clients: int, turns: int, more_urls: Sequence[str] = ()
) -> tuple[int, int]:
    """Tokens that were used, and how many requests were refused."""
    used, refused = 0, 0
    urls = [mesh.facts["url"], *more_urls]
    async with mesh.async_openai(max_retries=0) as plain:
        gateways = [plain.with_options(api_key=api_key, base_url=f"{url}/v1") for url in urls]

        async def one(index: int) -> None:
            nonlocal used, refused
            for turn in range(turns):
                client = gateways[(index + turn) % len(gateways)]
                try:
                    answer = await client.chat.completions.create(
                        model=mesh.model, messages=QUESTION, max_tokens=4 + index % 5
                    )
                    used += answer.usage.total_tokens
                except openai.RateLimitError:
                    refused += 1

        await asyncio.gather(*(one(index) for index in range(clients)))
    return used, refused


async def test_sixty_four_clients_use_no_more_than_a_thousand_tokens_per_minute(
    mesh: Mesh,
) -> None:
    key = make_tenant(mesh, "thousand", "--tokens-per-minute", "1000")
    used, refused = await burst(mesh, key, clients=64, turns=3)
    assert refused > 0
    assert 900 <= used <= 1000
    rows = usage_of(mesh, "thousand", 30)
    assert sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows) == used


async def test_three_gateways_admit_no_more_together_than_one(mesh: Mesh, tmp_path: Path) -> None:
    key = make_tenant(mesh, "shared", "--tokens-per-minute", "1000")
    with more_gateways(mesh, tmp_path, 2) as urls:
        used, refused = await burst(mesh, key, clients=64, turns=3, more_urls=urls)
    assert refused > 0
    assert 850 <= used <= 1000
    rows = usage_of(mesh, "shared", 30)
    assert sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows) == used


@pytest.mark.slow
async def test_mesh_on_postgresql_admits_no_more_over_one_and_three_gateways(
    tmp_path: Path, postgres: Postgres
) -> None:
    url = postgres.create_database()
    with Mesh(tmp_path, *LIGHT, "--set", f"auth.database_url={url}") as mesh:
        key = make_tenant(mesh, "thousand", "--tokens-per-minute", "1000")
        used, refused = await burst(mesh, key, clients=64, turns=2)
        assert refused > 0
        assert 900 <= used <= 1000
        key = make_tenant(mesh, "shared", "--tokens-per-minute", "1000")
        with more_gateways(mesh, tmp_path, 2) as urls:
            used, refused = await burst(mesh, key, clients=64, turns=2, more_urls=urls)
        assert refused > 0
        assert 850 <= used <= 1000


def test_dev_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    with Mesh(tmp_path, *LIGHT) as first:
        key = first.facts["api_key"]
        ask(first, key)
    with Mesh(tmp_path, *LIGHT) as second:
        assert second.facts["api_key"] == key
        ask(second, key)
        assert f"Authorization: Bearer {key}" in second.output.read_text()
    state = tmp_path / "state" / "infermesh"
    for name in ("dev-key", "auth.sqlite3"):
        assert (state / name).stat().st_mode & 0o077 == 0
    assert key not in second.logs()


def test_ledger_has_every_row_when_the_mesh_is_stopped_at_once(tmp_path: Path) -> None:
    with Mesh(tmp_path, *LIGHT) as mesh:
        for _ in range(3):
            ask(mesh, mesh.facts["api_key"])
        mesh.process.send_signal(signal.SIGINT)
        assert mesh.process.wait(60) == 0
        assert len(rows_of(mesh, "local")) == 3


def test_any_key_is_accepted_when_auth_is_off(tmp_path: Path) -> None:
    with Mesh(tmp_path, *LIGHT, "--no-auth") as mesh:
        assert mesh.facts["api_key"] == "local"
        ask(mesh, "whatever")
        assert not any(service["name"] == "auth" for service in mesh.facts["services"])


class Load:
    """Threads that ask until they are told to stop; what their clients received, by request id."""

    def __init__(self, mesh: Mesh, api_key: str) -> None:
        self._mesh = mesh
        self._api_key = api_key
        self._stopping = threading.Event()
        self.answered: dict[str, int] = {}
        self.cut: set[str] = set()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(4)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self, index: int) -> None:
        for number in itertools.count():
            if self._stopping.is_set():
                return
            request_id = f"{id(self)}-{index}-{number}"
            headers = {"x-request-id": request_id}
            try:
                answer = ask(self._mesh, self._api_key, max_tokens=4 + index, extra_headers=headers)
            except openai.APIError:
                self.cut.add(request_id)
            else:
                self.answered[request_id] = answer.usage.total_tokens

    def wait(self, more: int) -> None:
        """Until so many more were answered."""
        target = len(self.answered) + more
        wait_until(lambda: len(self.answered) >= target, 60)


def rows_of(mesh: Mesh, tenant: str) -> list[tuple[str, int]]:
    """The ledger's rows: request id and tokens."""
    path = mesh.tmp_path / "state" / "infermesh" / "auth.sqlite3"
    query = "SELECT request_id, prompt_tokens + completion_tokens FROM usage WHERE tenant_id = ?"
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as ledger:
        return list(ledger.execute(query, (tenant,)))


def assert_billed(mesh: Mesh, tenant: str, answered: dict[str, int], cut: set[str]) -> None:
    """Each answer that a client has was billed once; one that was cut at most once."""
    wait_until(lambda: answered.keys() <= {row[0] for row in rows_of(mesh, tenant)}, 30)
    rows = rows_of(mesh, tenant)
    assert len({request_id for request_id, _ in rows}) == len(rows)
    assert {request_id: tokens for request_id, tokens in rows if request_id not in cut} == answered


def test_known_keys_go_on_and_no_row_is_lost_or_doubled_when_auth_is_killed(mesh: Mesh) -> None:
    key = make_tenant(mesh, "steady", "--tokens-per-minute", "1000000")
    unknown = command(mesh, "keys", "create", "--tenant", "steady")
    with Load(mesh, key) as load:
        load.wait(10)
        for _ in range(2):
            # frozen before it dies, so that there is a while without it
            pid = mesh.kill("auth", signal.SIGSTOP)
            load.wait(4)
            with pytest.raises(openai.InternalServerError) as caught:
                ask(mesh, unknown)
            assert caught.value.status_code == 503
            assert int(caught.value.response.headers["retry-after"]) >= 1
            mesh.kill("auth")
            mesh.wait_restarted("auth", pid)
            load.wait(10)
    assert load.cut == set()
    assert_billed(mesh, "steady", load.answered, load.cut)
    ask(mesh, unknown)


def test_no_answer_is_billed_twice_or_never_when_the_gateway_is_killed(tmp_path: Path) -> None:
    answered: dict[str, int] = {}
    cut: set[str] = set()
    with Mesh(tmp_path, *LIGHT) as mesh:
        key = make_tenant(mesh, "steady", "--requests-per-minute", "100000")
        for _ in range(2):
            with Load(mesh, key) as load:
                load.wait(10)
                pid = mesh.kill("gateway")
                mesh.wait_restarted("gateway", pid)
                load.wait(10)
            answered |= load.answered
            cut |= load.cut
        assert_billed(mesh, "steady", answered, cut)
