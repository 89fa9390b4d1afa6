"""What the chart's pods may do, whom they may call, and where its secrets are."""

import base64
import copy
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.auth import api_key
from tests.deploy import chart

_EXAMPLES = pytest.mark.parametrize("path", chart.EXAMPLES, ids=lambda path: path.stem)
# https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
# Who may call whom, and where: the map of docs/architecture.md.
_ARROWS = {
    ("gateway", "auth", 8030),
    ("gateway", "cache", 8040),
    ("gateway", "replica", 8010),
}


def breaches(spec: dict[str, Any]) -> Iterator[str]:
    """What the restricted Pod Security Standard, and ours, would refuse."""
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield name
    for volume in spec.get("volumes", ()):
        if not set(volume) - {"name"} <= _VOLUMES:
            yield f"volume {volume['name']}"
    context = spec.get("securityContext", {})
    if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
        yield "root"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "seccompProfile"
    if spec.get("automountServiceAccountToken") is not False:
        yield "a token"
    for container in (*spec["containers"], *spec.get("initContainers", ())):
        own = container.get("securityContext", {})
        if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
            yield f"{container['name']}: privileges"
        if own.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{container['name']}: capabilities"
        if own.get("readOnlyRootFilesystem") is not True:
            yield f"{container['name']}: writes to its image"
        if any("hostPort" in port for port in container.get("ports", ())):
            yield f"{container['name']}: hostPort"


@_EXAMPLES
def test_every_pod_is_restricted(path: Path) -> None:
    pods = dict(chart.pods(chart.manifests(chart.example(path))))

    assert len(pods) >= 5
    found = {name: list(breaches(pod["spec"])) for name, pod in pods.items()}
    assert {name: one for name, one in found.items() if one} == {}


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda spec: spec.update(hostNetwork=True), "hostNetwork"),
        (lambda spec: spec["volumes"].append({"name": "x", "hostPath": {}}), "volume x"),
        (lambda spec: spec["securityContext"].update(runAsNonRoot=False), "root"),
        (lambda spec: spec["securityContext"].pop("seccompProfile"), "seccompProfile"),
        (lambda spec: spec.pop("automountServiceAccountToken"), "a token"),
        (lambda spec: spec["containers"][0].pop("securityContext"), "gateway: capabilities"),
    ],
)
def test_a_breach_is_seen(change: Any, seen: str) -> None:
    pods = dict(chart.pods(chart.manifests()))
    spec = copy.deepcopy(pods["Deployment/infermesh-gateway"]["spec"])
    change(spec)

    assert seen in breaches(spec)


@_EXAMPLES
def test_policies_allow_the_arrows_of_the_map_and_no_other(path: Path) -> None:
    objects = chart.manifests(chart.example(path))
    policies = chart.of_kind(objects, "NetworkPolicy").values()

    ingress, egress = set(), set()
    for policy in policies:
        own = component(policy["spec"]["podSelector"])
        for rule in policy["spec"].get("ingress", ()):
            froms = {component(one["podSelector"]) for one in rule.get("from", ()) if is_ours(one)}
            ingress |= {(peer, own, port["port"]) for peer in froms for port in rule["ports"]}
        for rule in policy["spec"]["egress"]:
            tos = {component(one["podSelector"]) for one in rule.get("to", ()) if is_ours(one)}
            egress |= {(own, peer, port["port"]) for peer in tos for port in rule["ports"]}
    assert egress == _ARROWS
    assert {arrow for arrow in ingress if arrow[0] != "test"} == _ARROWS


@_EXAMPLES
def test_every_pod_but_the_test_has_a_policy_both_ways(path: Path) -> None:
    objects = chart.manifests(chart.example(path))
    policies = [p["spec"] for p in chart.of_kind(objects, "NetworkPolicy").values()]

    for name, pod in chart.pods(objects):
        labels = pod["metadata"]["labels"].items()
        mine = [p for p in policies if p["podSelector"]["matchLabels"].items() <= labels]
        expected = [] if name.startswith("Pod/") else [["Ingress", "Egress"]]
        assert [p["policyTypes"] for p in mine] == expected, name


@_EXAMPLES
def test_policies_open_ports_that_exist(path: Path) -> None:
    objects = chart.manifests(chart.example(path))
    for policy in chart.of_kind(objects, "NetworkPolicy").values():
        wanted = policy["spec"]["podSelector"]["matchLabels"].items()
        for name, pod in chart.pods(objects):
            if not wanted <= pod["metadata"]["labels"].items():
                continue
            ports = {
                port["containerPort"]
                for container in pod["spec"]["containers"]
                for port in container.get("ports", ())
            }
            opened = {
                port["port"] for rule in policy["spec"].get("ingress", ()) for port in rule["ports"]
            }
            assert opened == ports, name


def is_ours(peer: dict[str, Any]) -> bool:
    return "app.kubernetes.io/component" in peer.get("podSelector", {}).get("matchLabels", {})


def component(selector: dict[str, Any]) -> str:
    found: str = selector["matchLabels"]["app.kubernetes.io/component"]
    return found


@_EXAMPLES
def test_no_secret_is_in_a_config_map_or_a_plain_variable(path: Path) -> None:
    objects = chart.manifests(chart.example(path))
    secret = re.compile(r"postgresql://|rediss?://|im-[a-z2-7]{12}-|BEGIN .*PRIVATE")

    for one in objects:
        if one["kind"] != "Secret":
            assert not secret.search(yaml.safe_dump(one)), one["metadata"]["name"]


def test_the_first_key_is_kept_with_the_database_that_knows_it() -> None:
    objects = chart.manifests()
    kept = [
        (one["kind"], one["metadata"]["name"])
        for one in objects
        if one["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
    ]

    assert kept == [("PersistentVolumeClaim", "infermesh-auth"), ("Secret", "infermesh-first-key")]


def test_redis_is_reached_by_auth_alone_and_its_url_is_a_secret() -> None:
    values = {
        "auth": {"redis": {"urlSecret": {"name": "leases"}}},
        "networkPolicy": {"redis": {"to": [{"podSelector": {}}]}},
    }
    objects = chart.manifests(values)
    open_to_redis = [
        name
        for name, policy in chart.of_kind(objects, "NetworkPolicy").items()
        for rule in policy["spec"]["egress"]
        if {"port": 6379, "protocol": "TCP"} in rule["ports"]
    ]
    assert [name.rpartition("-")[2] for name in open_to_redis] == ["auth"]
    (pod,) = [pod for name, pod in chart.pods(objects) if name.endswith("-auth")]
    (variable,) = [
        variable
        for variable in pod["spec"]["containers"][0]["env"]
        if variable["name"] == "INFERMESH_AUTH__REDIS_URL"
    ]
    assert variable["valueFrom"] == {"secretKeyRef": {"name": "leases", "key": "url"}}


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        ('(dict "data" (dict "api-key" "a2VwdA=="))', True),
        ('(dict "data" (dict "another" "a2VwdA=="))', False),
        ("(dict)", False),
    ],
)
def test_the_first_key_that_a_cluster_has_is_kept(tmp_path: Path, found: str, kept: bool) -> None:
    """What `lookup` would find stands in its place: without a cluster it finds nothing."""
    copied = tmp_path / "infermesh"
    shutil.copytree(chart.CHART, copied)
    template = copied / "templates" / "auth.yaml"
    text = re.sub(r"lookup [^}]*(?= }})", found, template.read_text())
    assert text != template.read_text()
    template.write_text(text)

    secret = chart.of_kind(chart.manifests(chart=copied), "Secret")["infermesh-first-key"]

    assert (secret["data"] == {"api-key": "a2VwdA=="}) is kept
    if not kept:
        drawn = base64.b64decode(secret["data"]["api-key"]).decode()
        assert api_key.id_of(drawn) is not None


@_EXAMPLES
def test_pods_end_later_than_what_runs_in_them(path: Path) -> None:
    """preStop and the grace of a container's settings fit into the time that the pod has."""
    objects = chart.manifests(chart.example(path))
    maps = chart.of_kind(objects, "ConfigMap")
    seen = 0
    for name, pod in chart.pods(objects):
        volumes = {one["name"]: one for one in pod["spec"].get("volumes", ())}
        if "config" not in volumes:
            continue
        files = maps[volumes["config"]["configMap"]["name"]]["data"]
        for container in pod["spec"]["containers"]:
            grace_s = float(
                re.findall(r"drain_grace_s = (\d+)", files[f"{container['name']}.toml"])[0]
            )
            pre_stop_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            assert pre_stop_s + grace_s + 5 < pod["spec"]["terminationGracePeriodSeconds"], name
            seen += 1
    assert seen >= 5
