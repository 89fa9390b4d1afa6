"""What operators add to a chart: environment, volumes, labels, objects of their own."""

from typing import Any

import kubernetes_validate
import pytest

from tests.deploy import chart

_WORKLOADS = ("gateway", "auth", "cache", "model-demo")
_POD: dict[str, Any] = {
    "annotations": {"reloader/auto": "true"},
    "podAnnotations": {"note": "pod"},
    "podLabels": {"team": "a"},
    "priorityClassName": "high",
    "nodeSelector": {"disk": "ssd"},
    "extraVolumes": [{"name": "ca", "configMap": {"name": "company-ca"}}],
}
_CONTAINER: dict[str, Any] = {
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    "extraEnvFrom": [{"secretRef": {"name": "more"}}],
    "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/ssl/company", "readOnly": True}],
}
_DEMO = {"name": "demo", "source": "path:///app/demo/model"}
_ADDED: dict[str, Any] = {
    **{name: {**_POD, **_CONTAINER} for name in ("gateway", "auth", "cache")},
    "scheduler": _CONTAINER,
    "shard": _CONTAINER,
    "models": [{**_DEMO, **_POD, "checksum": "sha256:" + "0" * 64}],
}


def workloads(values: dict[str, Any]) -> dict[str, chart.Manifest]:
    return {
        one["metadata"]["name"].removeprefix("infermesh-"): one
        for one in chart.manifests(values)
        if one["kind"] in ("Deployment", "StatefulSet")
    }


@pytest.mark.parametrize("name", _WORKLOADS)
def test_every_component_takes_the_same_additions(name: str) -> None:
    one = workloads(_ADDED)[name]
    template = one["spec"]["template"]

    assert one["metadata"]["annotations"] == _POD["annotations"]
    assert template["metadata"]["annotations"]["note"] == "pod"
    assert template["metadata"]["labels"]["team"] == "a"
    assert template["spec"]["priorityClassName"] == "high"
    assert template["spec"]["nodeSelector"] == _POD["nodeSelector"]
    assert _POD["extraVolumes"][0] in template["spec"]["volumes"]
    containers = [*template["spec"]["containers"], *template["spec"].get("initContainers", ())]
    assert len(containers) == (3 if name.startswith("model") else 1)
    for container in containers:
        assert _CONTAINER["extraEnv"][0] in container["env"]
        assert _CONTAINER["extraEnvFrom"][0] in container["envFrom"]
        assert _CONTAINER["extraVolumeMounts"][0] in container["volumeMounts"]


def test_objects_with_all_additions_are_valid_for_kubernetes() -> None:
    labels = {"commonLabels": {"team": "a"}, "commonAnnotations": {"by": "us"}}
    balancer = {
        "type": "LoadBalancer",
        "labels": {"public": "yes"},
        "annotations": {"size": "small"},
        "loadBalancerClass": "cloud/internal",
        "loadBalancerSourceRanges": ["10.0.0.0/8"],
        "externalTrafficPolicy": "Local",
    }
    gateway = {**_ADDED["gateway"], "service": balancer}
    for one in chart.manifests({**_ADDED, **labels, "gateway": gateway}):
        kubernetes_validate.validate(one, "1.30", strict=True)
        assert one["metadata"]["labels"]["team"] == "a"
        assert one["metadata"]["annotations"]["by"] == "us"


def test_labels_of_all_objects_are_not_in_selectors_which_never_change() -> None:
    values = {"commonLabels": {"version": "2"}}
    for one in workloads(values).values():
        assert "version" not in one["spec"]["selector"]["matchLabels"]
        assert "version" not in one["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize("name", ["gateway", "auth", "model-demo"])
def test_pods_of_a_component_are_spread_over_nodes(name: str) -> None:
    spec = workloads({})[name]["spec"]

    (spread,) = spec["template"]["spec"]["topologySpreadConstraints"]

    assert spread["labelSelector"] == spec["selector"]
    assert spread["whenUnsatisfiable"] == "ScheduleAnyway"


def test_a_spread_with_a_selector_keeps_it() -> None:
    own = {
        "maxSkew": 2,
        "topologyKey": "topology.kubernetes.io/zone",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"team": "a"}},
    }
    gateway = workloads({"gateway": {"topologySpreadConstraints": [own]}})["gateway"]

    assert gateway["spec"]["template"]["spec"]["topologySpreadConstraints"] == [own]


def test_images_come_from_the_registry_of_an_umbrella_chart() -> None:
    values = {
        "global": {"imageRegistry": "registry.example.com/", "imagePullSecrets": [{"name": "a"}]},
        "imagePullSecrets": [{"name": "b"}],
        "models": [{**_DEMO, "checksum": "sha256:" + "0" * 64}],
    }
    for _, pod in chart.pods(chart.manifests(values)):
        assert {one["name"] for one in pod["spec"]["imagePullSecrets"]} == {"a", "b"}
        for container in (*pod["spec"]["containers"], *pod["spec"].get("initContainers", ())):
            assert container["image"].startswith("registry.example.com/infermesh/co")


def test_objects_of_ones_own_are_templates() -> None:
    text = 'kind: ConfigMap\napiVersion: v1\nmetadata: {name: "{{ .Release.Name }}-a"}'
    written = {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "b"}}

    maps = chart.of_kind(chart.manifests({"extraObjects": [text, written]}), "ConfigMap")

    assert {"infermesh-a", "b"} <= set(maps)


@pytest.mark.parametrize(
    ("drain", "seconds"),
    [
        ({"preStopSeconds": 5, "graceSeconds": 30}, 45),
        ({"preStopSeconds": 5, "graceSeconds": 30, "terminationSeconds": 90}, 90),
    ],
)
def test_a_pod_has_the_time_to_end_that_its_drain_wants(
    drain: dict[str, int], seconds: int
) -> None:
    spec = workloads({"gateway": {"drain": drain}})["gateway"]["spec"]["template"]["spec"]

    assert spec["terminationGracePeriodSeconds"] == seconds


def test_routes_let_streams_live_as_long_as_their_requests() -> None:
    values = {
        "gatewayApi": {
            "enabled": True,
            "annotations": {"a": "b"},
            "parentRefs": [{"name": "public"}],
            "grpcHostnames": ["grpc.example.com"],
        }
    }
    objects = chart.manifests(values)
    (http,) = chart.of_kind(objects, "HTTPRoute").values()
    (grpc,) = chart.of_kind(objects, "GRPCRoute").values()
    (service,) = [
        one
        for one in chart.of_kind(objects, "Service").values()
        if one["metadata"]["name"] == "infermesh-gateway"
    ]

    (rule,) = http["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s"}  # none, says the Gateway API
    ports = {one["port"]: one["appProtocol"] for one in service["spec"]["ports"]}
    assert ports[rule["backendRefs"][0]["port"]] == "http"
    assert ports[grpc["spec"]["rules"][0]["backendRefs"][0]["port"]] == "kubernetes.io/h2c"
    assert http["metadata"]["annotations"] == grpc["metadata"]["annotations"] == {"a": "b"}


def test_an_ingress_keeps_streams_alive_and_does_not_hold_them_back() -> None:
    values = {
        "ingress": {
            "enabled": True,
            "host": "llm.example.com",
            "annotations": {"nginx.ingress.kubernetes.io/proxy-body-size": "32m"},
        }
    }
    (ingress,) = chart.of_kind(chart.manifests(values), "Ingress").values()
    found = ingress["metadata"]["annotations"]

    assert found["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
    assert int(found["nginx.ingress.kubernetes.io/proxy-read-timeout"]) > 600
    assert found["nginx.ingress.kubernetes.io/proxy-body-size"] == "32m"
