"""A process that other machines could reach unprotected does not even begin."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.server import GatewayService
from infermesh.config import (
    AuthConfig,
    CacheConfig,
    ConfigError,
    GatewayConfig,
    SchedulerConfig,
    SecurityConfig,
    ShardConfig,
)
from infermesh.security.identities import Identity
from infermesh.security.posture import LOCAL, Security
from services.auth.service import AuthProcess
from services.cache.service import CacheService
from services.scheduler.service import SchedulerProcess
from services.shard.service import ShardService
from tests import certificates

Make = Callable[[Security], Any]
AWAY = "10.1.2.3:8000"


def auth(setting: str) -> Make:
    config = AuthConfig(**{"database_url": "sqlite:///unused", setting: AWAY})  # type: ignore[arg-type]
    return lambda security: AuthProcess(config, security=security)


# identity, setting, the service with AWAY at this setting
CASES: list[tuple[Identity, str, Make]] = [
    (Identity.SHARD, "shard.address", lambda s: ShardService(ShardConfig(address=AWAY), s)),
    (
        Identity.SCHEDULER,
        "scheduler.address",
        lambda s: SchedulerProcess(SchedulerConfig(address=AWAY), s),
    ),
    (
        Identity.SCHEDULER,
        "scheduler.shard",
        lambda s: SchedulerProcess(SchedulerConfig(shard=AWAY), s),
    ),
    (
        Identity.CACHE,
        "cache.address",
        lambda s: CacheService(CacheConfig(address=AWAY, embedder="none"), s),
    ),
    (Identity.AUTH, "auth.address", auth("address")),
    (Identity.AUTH, "auth.admin_address", auth("admin_address")),
    (
        Identity.GATEWAY,
        "gateway.replicas",
        lambda s: GatewayService(GatewayConfig(replicas=(AWAY,)), s),
    ),
    (Identity.GATEWAY, "gateway.cache", lambda s: GatewayService(GatewayConfig(cache=AWAY), s)),
]


@pytest.mark.parametrize(("identity", "setting", "make"), CASES, ids=[case[1] for case in CASES])
async def test_address_beyond_this_machine_wants_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, identity: Identity, setting: str, make: Make
) -> None:
    monkeypatch.chdir(tmp_path)  # the database's file
    with pytest.raises(ConfigError, match=rf"{setting} is {AWAY}.*security\.tls_folder"):
        make(LOCAL)
    folder = str(certificates.make(tmp_path / "tls"))
    make(Security.of(SecurityConfig(tls_folder=folder), identity))
