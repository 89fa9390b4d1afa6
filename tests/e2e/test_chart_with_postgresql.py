"""The example with PostgreSQL and Redis of one's own runs whole: two of everything that may be two,
mutual TLS with the certificates that `infermesh certs` made, the migration before it.
"""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from services.auth import api_key
from tests.deploy import chart
from tests.deploy.local_cluster import LocalCluster
from tests.postgres import Postgres
from tests.redis_server import RedisServer

_EXAMPLE = chart.CHART / "examples" / "own-postgresql-and-redis.yaml"


def operators_secrets(folder: Path, url: str, redis_url: str) -> dict[str, dict[str, str]]:
    """What the example says that is there."""
    command = [sys.executable, "-m", "infermesh.cli", "certs", "--folder", str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=chart.ROOT)
    public = rsa.generate_private_key(65537, 2048).public_key()
    key = jwt.algorithms.RSAAlgorithm.to_jwk(public, as_dict=True)
    names = chart.example(_EXAMPLE)["tls"]["secrets"]
    files = ("ca.crt", "tls.crt", "tls.key")
    return {
        "infermesh-database": {"url": url},
        "infermesh-redis": {"url": redis_url},
        "infermesh-admin-key": {"api-key": api_key.draw()[1]},
        "infermesh-issuer": {"jwks.json": json.dumps({"keys": [{**key, "kid": "1"}]})},
        **{
            name: {file: (folder / identity / file).read_text() for file in files}
            for identity, name in names.items()
        },
    }


@pytest.mark.slow
def test_example_with_postgresql_and_redis_answers_and_ends(
    tmp_path: Path, postgres: Postgres, redis_server: RedisServer
) -> None:
    stores = postgres.create_database(), redis_server.new_database()
    secrets = operators_secrets(tmp_path / "tls", *stores)

    with LocalCluster(chart.manifests(chart.example(_EXAMPLE)), secrets) as running:
        running.wait_ready()
        migrated = running.run_job("infermesh-auth-migration")
        assert migrated.returncode == 0, migrated.stderr
        done = running.run_test()
        assert done.returncode == 0, done.stderr
        while known_replicas(running) != [2, 2]:
            time.sleep(0.1)  # a poll: a gateway tells nobody what it has learned
        own = redis_server.client(stores[1])
        number = str(own.client_info()["db"])
        clients = [one for one in own.client_list() if str(one["db"]) == number]
        assert len(clients) > 2  # both auth services are there, and this test
        assert set(running.stop().values()) == {0}


def known_replicas(running: LocalCluster) -> list[int]:
    """How many each gateway may route to, as its admin port says."""
    counts = []
    for pod in running.namespace.pods:
        if pod.owner == "Deployment/infermesh-gateway":
            url = f"http://{pod.inner}:8001/debug/replicas"
            with urllib.request.urlopen(url, timeout=10) as answer:
                counts.append(sum(one["routable"] for one in json.load(answer)))
    return counts
