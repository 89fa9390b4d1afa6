"""Two auth processes with their leases in one Redis, two gateways; one of them is killed, and Redis
freezes.
"""

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.mesh_process import Mesh, environment, wait_until
from tests.e2e.test_auth import LIGHT, ask, burst, make_tenant, more_gateways, rows_of
from tests.redis_server import running_redis

LIMIT = 1000


@contextlib.contextmanager
def second_auth(folder: Path, address: str, redis_url: str) -> Iterator[None]:
    """Another auth process on the mesh's database."""
    flags = {
        "auth.address": address,
        "auth.database_url": f"sqlite:///{folder}/state/infermesh/auth.sqlite3",
        "telemetry.announce_file": str(folder / "second.json"),
    }
    with (folder / "second.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.auth", *(f"--{k}={v}" for k, v in flags.items())],
            env={**environment(folder), "INFERMESH_AUTH__REDIS_URL": redis_url},
            stdout=log,
            stderr=log,
        )
        try:
            wait_until((folder / "second.json").exists, 60)
            yield
        finally:
            process.terminate()
            process.wait(30)


async def test_two_auth_services_on_redis_admit_no_more_than_one_also_when_one_is_killed(
    tmp_path: Path,
) -> None:
    second = f"unix:{tmp_path}/second.sock"
    with running_redis() as redis, contextlib.ExitStack() as stack:
        url = redis.url()
        settings = (f"auth.redis_url={url}", f"gateway.auth={second}")
        more = [word for setting in settings for word in ("--set", setting)]
        mesh = stack.enter_context(Mesh(tmp_path, *LIGHT, *more))
        key = make_tenant(mesh, "shared", "--tokens-per-minute", str(LIMIT))
        stack.enter_context(second_auth(tmp_path, second, url))
        both = f"{mesh.service('auth')['address']},{second}"
        urls = stack.enter_context(more_gateways(mesh, tmp_path, 1, both))
        first, _ = await burst(mesh, key, clients=8, turns=1, more_urls=urls)
        asking = asyncio.create_task(burst(mesh, key, clients=32, turns=2, more_urls=urls))
        await asyncio.sleep(0)
        pid = mesh.kill("auth")
        used, refused = await asking
        assert refused > 0, "every answer was 200 or 429"
        assert LIMIT - 2 * 75 <= first + used <= LIMIT
        wait_until(lambda: billed(mesh) == first + used, 30, "the ledger has every answer")
        mesh.wait_restarted("auth", pid)
        redis.signal(signal.SIGSTOP)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(mesh, key, max_tokens=200)  # more than any lease has left
        assert (caught.value.status_code, caught.value.code) == (503, "auth_unavailable")
        assert failures(mesh) > 0
        redis.signal(signal.SIGCONT)
        with contextlib.suppress(openai.RateLimitError):  # unless the minute is over
            ask(mesh, key, max_tokens=200)


def billed(mesh: Mesh) -> int:
    """Tokens of the tenant that both gateways serve."""
    return sum(tokens for _, tokens in rows_of(mesh, "shared"))


def failures(mesh: Mesh) -> float:
    """What either auth process says of Redis: the gateway may ask one or the other."""
    of_second = (mesh.tmp_path / "second.log").read_text().count("redis failed")
    return of_second + mesh.metric("auth", "lease_store_failures_total", reason="timeout")
