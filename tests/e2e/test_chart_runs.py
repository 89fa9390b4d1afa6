"""What the chart renders runs: each container's command, files, environment and probes, as
processes of this machine, and then what `helm test` runs.
"""

import copy
import os
import re
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from services.shard.fetch import checksum
from tests.deploy import chart, issuer, operators_page, scraping
from tests.deploy.local_cluster import LocalCluster, NeverReady
from tests.object_store import serving

_DEMO = chart.CHART / "examples" / "cpu-demo.yaml"
_GATEWAY, _AUTH = "Deployment/infermesh-gateway", "Deployment/infermesh-auth"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(chart.manifests(chart.example(_DEMO))) as running:
        running.wait_ready()
        yield running


def test_every_container_of_the_example_is_ready_and_alive(cluster: LocalCluster) -> None:
    names = {one.manifest["name"] for one in cluster.containers}

    assert names == {"gateway", "auth", "cache", "scheduler", "shard"}
    assert [one.name for one in cluster.containers if not one.passes("livenessProbe")] == []


def test_helm_test_gets_an_answer(cluster: LocalCluster) -> None:
    done = cluster.run_test()

    assert done.returncode == 0, done.stderr
    assert "demo answered in" in done.stdout
    assert "SERVING" in done.stdout


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (":80", ":8001"),
        ("--url=http://infermesh-gateway", "--url=http://infermesh-gatewax"),
        (":8002", ":8003"),
        ("--grpc=", "--rpc="),
        ("--wait=60", "--wait=0 --model=another"),
    ],
)
def test_helm_test_fails_where_its_command_is_wrong(
    cluster: LocalCluster, old: str, new: str
) -> None:
    (pod,) = [copy.deepcopy(o) for o in cluster.namespace.objects if o["kind"] == "Pod"]
    (container,) = pod["spec"]["containers"]
    words = [word.replace(old, new, 1) for word in container["args"]]
    assert words != container["args"]
    container["args"] = [part for word in words for part in word.split(" ")]

    assert cluster.run_test(pod).returncode != 0


def test_helm_test_fails_with_another_key(cluster: LocalCluster) -> None:
    secret = cluster.namespace.secrets["infermesh-first-key"]
    right = secret["api-key"]
    secret["api-key"] = right[:-1] + ("a" if right[-1] != "a" else "b")
    try:
        done = cluster.run_test()
    finally:
        secret["api-key"] = right

    assert done.returncode != 0
    assert "Incorrect API key" in done.stderr


def test_a_gateway_beside_it_answers_as_it_is(cluster: LocalCluster) -> None:
    values = {**chart.example(_DEMO), "test": {"waitSeconds": 30}}

    with cluster.beside(chart.manifests(values), _GATEWAY) as beside:
        beside.wait_ready()

        assert beside.run_test().returncode == 0
        assert set(beside.stop().values()) == {0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("infermesh-auth.mesh.svc:8030", "infermesh-auth.mesh.svc:8031"),
        ("infermesh-auth.mesh.svc", "infermesh-authn.mesh.svc"),
        ("dns:infermesh-model-demo.mesh.svc:8010", "dns:infermesh-model-demo.mesh.svc:8020"),
        ("dns:infermesh-model-demo", "infermesh-model-dem"),
    ],
)
def test_helm_test_fails_where_a_gateway_looks_in_the_wrong_place(
    cluster: LocalCluster, old: str, new: str
) -> None:
    objects = chart.manifests({**chart.example(_DEMO), "test": {"waitSeconds": 3}})
    data = chart.of_kind(objects, "ConfigMap")["infermesh-gateway"]["data"]
    assert old in data["gateway.toml"]
    data["gateway.toml"] = data["gateway.toml"].replace(old, new)

    with cluster.beside(objects, _GATEWAY) as beside:
        beside.wait_ready()  # it serves, and says 503

        assert beside.run_test().returncode != 0


def test_keys_are_made_in_auths_pod_as_the_notes_say(cluster: LocalCluster) -> None:
    (auth,) = [pod for pod in cluster.namespace.pods if pod.owner == _AUTH]

    done = cluster.run(auth, notes_command(chart.example(_DEMO)))

    assert done.stdout.startswith("im-"), done.stderr


def test_the_operators_page_followed_line_by_line_gets_an_answer(cluster: LocalCluster) -> None:
    (auth,) = [pod for pod in cluster.namespace.pods if pod.owner == _AUTH]
    (gateway,) = [pod for pod in cluster.namespace.pods if pod.owner == _GATEWAY]
    lines = list(operators_page.lines(operators_page.PAGE))
    said = [
        cluster.run(auth, line.partition(" -- ")[2].split()) for line in lines if " exec " in line
    ]
    (made,) = [one.stdout.split()[0] for one in said if one.stdout.startswith("im-")]
    (curl,) = [line for line in lines if line.startswith("curl ")]

    answer = subprocess.run(
        ["sh", "-c", curl.replace("127.0.0.1", gateway.address)],
        env={**os.environ, "INFERMESH_API_KEY": made},
        capture_output=True,
        text=True,
        check=True,
    )

    assert [one.returncode for one in said] == [0] * 3, said
    assert "Paris" in "".join(re.findall(r'"content":"([^"]*)"', answer.stdout))
    assert answer.stdout.rstrip().endswith("data: [DONE]")


def notes_command(values: dict[str, Any]) -> list[str]:
    """What NOTES.txt tells an operator to run in auth's pod."""
    notes = chart.texts(values)["infermesh/templates/NOTES.txt"]
    (line,) = [one for one in notes.splitlines() if "kubectl" in one and " exec " in one]
    return line.partition(" -- ")[2].split()


def test_what_scales_the_mesh_is_exported_by_the_pods_that_it_scales(cluster: LocalCluster) -> None:
    scaled = {"enabled": True, "tokensPerSecond": 100}
    gateway = {"autoscaling": {"enabled": True}}
    models = [{**chart.example(_DEMO)["models"][0], "autoscaling": scaled}]
    prometheus = {"address": "http://prometheus"}
    objects = chart.manifests({"gateway": gateway, "models": models, "prometheus": prometheus})

    for one in chart.of_kind(objects, "ScaledObject").values():
        target = "{kind}/{name}".format(**one["spec"]["scaleTargetRef"])
        exported = exported_by(cluster, target)
        for trigger in one["spec"]["triggers"]:
            (metric,) = re.findall(r"infermesh_\w+(?=\{)", trigger["metadata"]["query"])
            assert metric in exported


def exported_by(cluster: LocalCluster, owner: str) -> set[str]:
    """Names of the samples that the metrics ports of an owner's pods show."""
    names: set[str] = set()
    for pod in cluster.namespace.pods:
        if pod.owner == owner:
            port = pod.port("metrics", pod.containers)
            with urllib.request.urlopen(f"http://{pod.address}:{port}/metrics") as answer:
                names |= set(re.findall(r"^(\w+)", answer.read().decode(), re.M))
    return names


def monitor() -> chart.Manifest:
    """What Prometheus' operator is told."""
    values = {**chart.example(_DEMO), "monitoring": {"podMonitor": {"enabled": True}}}
    (found,) = chart.of_kind(chart.manifests(values), "PodMonitor").values()
    return found


def test_every_container_is_scraped_as_the_monitor_says(cluster: LocalCluster) -> None:
    scraped = scraping.scrape_all(monitor(), cluster.namespace.pods)

    assert {name.rpartition("/")[2] for name in scraped} == {
        *("gateway", "auth", "cache", "scheduler", "shard")
    }
    for name, found in scraped.items():
        assert isinstance(found, dict), (name, found)
        assert any(metric.startswith("infermesh_") for metric in found), name


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        (lambda spec: spec["podMetricsEndpoints"][0].update(port="metric"), 4),
        (lambda spec: spec["podMetricsEndpoints"][0].update(port="grpc"), 4),
        (lambda spec: spec["podMetricsEndpoints"][1].update(port="metrics"), 1),
        (lambda spec: spec["podMetricsEndpoints"][0].update(path="/metric"), 4),
        (lambda spec: spec["podMetricsEndpoints"][0].update(scheme="https"), 4),
        (lambda spec: spec["selector"]["matchLabels"].popitem(), 0),
        (
            lambda spec: spec["selector"]["matchLabels"].update(
                {"app.kubernetes.io/instance": "infermesh-2"}
            ),
            5,
        ),
    ],
    ids=["no port", "grpc", "no shard", "path", "scheme", "wider", "another release"],
)
def test_a_mistake_in_the_monitor_is_seen_by_a_scrape(
    cluster: LocalCluster, change: Callable[[Any], None], failed: int
) -> None:
    changed = monitor()
    change(changed["spec"])

    scraped = scraping.scrape_all(changed, cluster.namespace.pods)

    assert sum(isinstance(found, str) for found in scraped.values()) == failed


def test_nothing_is_written_beside_the_volumes(cluster: LocalCluster) -> None:
    assert list(cluster.home.iterdir()) == []


def test_services_speak_mutual_tls_with_the_certificates_that_the_chart_asks_for() -> None:
    values = {**chart.example(_DEMO), "cache": {"enabled": False}, "tls": {"mode": "certManager"}}
    objects = chart.manifests(values)

    with LocalCluster(objects, issuer.issue(objects)) as running:
        running.wait_ready()
        done = running.run_test()
        (auth,) = [pod for pod in running.namespace.pods if pod.owner == _AUTH]
        made = running.run(auth, notes_command(values))
        without = running.run(auth, [w for w in notes_command(values) if "TLS_FOLDER" not in w])

        assert done.returncode == 0, done.stderr
        assert made.stdout.startswith("im-"), made.stderr
        assert without.returncode != 0
        assert set(running.stop().values()) == {0}


def test_a_model_of_a_bucket_is_fetched_checked_and_answers() -> None:
    folder = chart.ROOT / "demo" / "model"
    objects = {f"chat/v1/{one.name}": one.read_bytes() for one in folder.iterdir()}
    with serving(objects) as store:
        store.bucket = "weights"
        s3 = {
            "endpointUrl": store.url.replace("127.0.0.1", "localhost"),
            "credentialsSecret": "bucket-key",
        }
        model = {
            "name": "chat",
            "source": "s3://weights/chat/v1",
            "checksum": checksum.of_folder(folder),
            "download": {"s3": s3},
        }
        values = {
            "models": [model],
            "auth": {"enabled": False},
            "cache": {"enabled": False},
            "gateway": {"replicas": 1},
            "networkPolicy": {"download": {"port": int(store.url.rpartition(":")[2])}},
        }
        key = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}

        with LocalCluster(chart.manifests(values), {"bucket-key": key}) as running:
            running.wait_ready()
            done = running.run_test()

            assert done.returncode == 0, done.stderr
            assert "chat answered in" in done.stdout
            (said,) = running.said.values()
            assert f"has the checksum {model['checksum']}" in said
            assert store.downloads("model.safetensors") == 1
            assert all("Credential=key/" in token for token in store.tokens)


# a moment's patience: what is wrong never becomes right
_IMPATIENT: dict[str, Any] = {
    "cache": {"enabled": False},
    "gateway": {"probes": {"startup": {"periodSeconds": 1, "failureThreshold": 6}}},
    "auth": {"probes": {"startup": {"periodSeconds": 1, "failureThreshold": 6}}},
}


def _container(objects: list[chart.Manifest], owner: str) -> chart.Manifest:
    pods = dict(chart.pods(objects))
    found: chart.Manifest = pods[owner]["spec"]["containers"][0]
    return found


def _wrong_flag(objects: list[chart.Manifest]) -> None:
    _container(objects, _AUTH)["args"] = ["--configs=/etc/infermesh/config/auth.toml"]


def _wrong_module(objects: list[chart.Manifest]) -> None:
    _container(objects, _AUTH)["command"] = ["python", "-m", "services.auths"]


def _wrong_path_of_settings(objects: list[chart.Manifest]) -> None:
    _container(objects, _AUTH)["volumeMounts"][0]["mountPath"] = "/etc/infermesh/conf"


def _wrong_path_of_data(objects: list[chart.Manifest]) -> None:
    _container(objects, _AUTH)["volumeMounts"][-1]["mountPath"] = "/var/lib/elsewhere"


def _wrong_path_of_the_key(objects: list[chart.Manifest]) -> None:
    (volume,) = [
        one
        for one in dict(chart.pods(objects))[_AUTH]["spec"]["volumes"]
        if one["name"] == "first-key"
    ]
    volume["secret"]["items"][0]["path"] = "key"


def _wrong_port(objects: list[chart.Manifest]) -> None:
    _container(objects, _AUTH)["ports"][1]["containerPort"] = 8032


def _wrong_name_of_a_port(objects: list[chart.Manifest]) -> None:
    _container(objects, _AUTH)["startupProbe"]["httpGet"]["port"] = "probes"


def _wrong_path_of_a_probe(objects: list[chart.Manifest]) -> None:
    _container(objects, _AUTH)["startupProbe"]["httpGet"]["path"] = "/ready"


def _wrong_setting(objects: list[chart.Manifest]) -> None:
    data = chart.of_kind(objects, "ConfigMap")["infermesh-auth"]["data"]
    data["auth.toml"] = data["auth.toml"].replace("drain_grace_s", "drain_s")


def _links_to_services(objects: list[chart.Manifest]) -> None:
    del dict(chart.pods(objects))[_AUTH]["spec"]["enableServiceLinks"]


def test_what_is_changed_below_starts_as_it_is() -> None:
    with LocalCluster(chart.manifests(_IMPATIENT), only=(_AUTH,)) as running:
        running.wait_ready()

        assert set(running.stop().values()) == {0}


@pytest.mark.parametrize(
    "change",
    [
        _wrong_flag,
        _wrong_module,
        _wrong_path_of_settings,
        _wrong_path_of_data,
        _wrong_path_of_the_key,
        _wrong_setting,
        _links_to_services,
        # these use up the probe's budget
        _wrong_port,
        pytest.param(_wrong_name_of_a_port, marks=pytest.mark.slow),
        pytest.param(_wrong_path_of_a_probe, marks=pytest.mark.slow),
    ],
    ids=lambda change: change.__name__.strip("_"),
)
def test_a_mistake_in_the_chart_keeps_its_pod_from_starting(
    change: Callable[[list[chart.Manifest]], None],
) -> None:
    objects = chart.manifests(_IMPATIENT)
    change(objects)

    with LocalCluster(objects, only=(_AUTH,)) as running, pytest.raises(NeverReady):
        running.wait_ready()
