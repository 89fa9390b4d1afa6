"""deploy/compose.yaml runs: each service's command, environment, files and health check, as
processes of this machine, on a real PostgreSQL and a real Redis.
"""

import re
import subprocess
import sys

import pytest

from infermesh import config_load
from services.auth import api_key
from tests.deploy import compose
from tests.deploy.local_cluster import LocalCluster
from tests.postgres import Postgres
from tests.redis_server import RedisServer

_URL = "INFERMESH_AUTH__DATABASE_URL"
_REDIS = "INFERMESH_AUTH__REDIS_URL"
_ENVIRONMENT = {"POSTGRES_PASSWORD": "word", "GRAFANA_PASSWORD": "word"}


def test_compose_file_names_settings_that_exist() -> None:
    for name, service in compose.load(_ENVIRONMENT)["services"].items():
        if name not in compose.FOREIGN:
            config_load.load([], service["environment"])


def test_compose_file_confines_every_service_of_ours() -> None:
    for name, service in compose.load(_ENVIRONMENT)["services"].items():
        if name in compose.FOREIGN:
            continue
        assert service["user"] == "65532:65532"
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    published = re.findall(r"ports: \[(.*)\]", compose.FILE.read_text())
    assert len(published) == 3
    assert all(one.strip('" ').startswith("127.0.0.1:") for p in published for one in p.split(","))


def test_compose_file_gives_services_the_time_that_they_need_to_end() -> None:
    services = compose.load(_ENVIRONMENT)["services"]
    for name in ("scheduler", "shard", "gateway"):
        settings = config_load.load([], services[name]["environment"])
        grace_s = getattr(settings, name).drain_grace_s
        assert int(services[name]["stop_grace_period"].removesuffix("s")) > grace_s + 5


def test_compose_file_scrapes_every_metrics_port() -> None:
    content = compose.load(_ENVIRONMENT)
    text = content["configs"]["prometheus"]["content"]
    targets = set(re.findall(r"[a-z]+:\d+", text.partition("targets:")[2]))
    ports = {
        f"{name}:{service['environment']['INFERMESH_TELEMETRY__METRICS_ADDRESS'].split(':')[1]}"
        for name, service in content["services"].items()
        if name not in compose.FOREIGN
    }

    assert targets == ports


@pytest.mark.slow
def test_compose_file_answers_and_ends(postgres: Postgres, redis_server: RedisServer) -> None:
    content = compose.load(_ENVIRONMENT)
    assert content["services"]["auth"]["environment"][_URL].startswith(
        "postgresql://infermesh:word@"
    )
    key = api_key.draw()[1]
    secrets = {
        _URL: {"value": postgres.create_database()},
        _REDIS: {"value": redis_server.new_database()},
        "secrets": {"first-key": key},
    }
    objects = compose.manifests(content, frozenset({_URL, _REDIS}))

    cluster = LocalCluster(objects, secrets, shared=frozenset({"replica"}))
    for pod in cluster.namespace.pods:
        pod.inner = pod.address  # a health check goes to 127.0.0.1, and finds 0.0.0.0

    with cluster as running:
        running.wait_ready()
        (gateway,) = [p for p in running.namespace.pods if p.name == "gateway-0"]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "infermesh.cli", "check", "--wait=30"),
                *(f"--url=http://{gateway.address}:8000", f"--grpc={gateway.address}:8002"),
                f"--api-key={key}",
            ],
            capture_output=True,
            text=True,
            check=False,
        )

        assert done.returncode == 0, done.stderr
        assert set(running.stop().values()) == {0}
