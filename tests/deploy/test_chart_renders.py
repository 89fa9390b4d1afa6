"""Every example is valid for Helm and for Kubernetes, and is what it was when it was reviewed.

`python -m tests.deploy.golden` writes the snapshots anew.
"""

import copy
import json
import re
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest

from deploy.helm import make_schema, schema_parts
from infermesh import config_load
from infermesh.config_fields import ConfigError
from tests.deploy import chart, golden

_EXAMPLES = pytest.mark.parametrize("path", chart.EXAMPLES, ids=lambda path: path.stem)
# The oldest version that Chart.yaml allows, and the newest that there is.
_VERSIONS = ("1.30", kubernetes_validate.latest_version())
# Kinds of other projects, whose schemas Kubernetes does not have.
_FOREIGN = {
    "cert-manager.io/v1": {"Certificate", "Issuer"},
    "gateway.networking.k8s.io/v1": {"GRPCRoute", "HTTPRoute"},
    "keda.sh/v1alpha1": {"ScaledObject"},
    "monitoring.coreos.com/v1": {"PodMonitor", "PrometheusRule"},
}


def is_foreign(one: chart.Manifest) -> bool:
    return one["kind"] in _FOREIGN.get(one["apiVersion"], ())


@_EXAMPLES
def test_chart_lints_strictly_with_every_example(path: Path) -> None:
    report = helm_python.lint(
        chart.CHART, chart.example(path), strict=True, namespace=chart.NAMESPACE
    )

    worse = [one for one in report["messages"] if one["severity"] > 1]
    assert (report["errors"], worse) == ([], [])
    assert report["total_charts_linted"] == 1


@_EXAMPLES
@pytest.mark.parametrize("version", _VERSIONS)
def test_manifests_are_valid_for_kubernetes(path: Path, version: str) -> None:
    objects = [one for one in chart.manifests(chart.example(path)) if not is_foreign(one)]

    assert len(objects) > 15
    for one in objects:
        kubernetes_validate.validate(one, version, strict=True)


def test_validation_sees_a_field_that_does_not_exist() -> None:
    deployment = copy.deepcopy(chart.of_kind(chart.manifests(), "Deployment")["infermesh-gateway"])
    deployment["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, _VERSIONS[0], strict=True)


@_EXAMPLES
def test_chart_renders_what_was_reviewed(path: Path) -> None:
    assert chart.snapshot(chart.example(path)) == golden.file_of(path).read_text(), (
        "if the change is meant: python -m tests.deploy.golden"
    )


def test_values_schema_is_current() -> None:
    assert make_schema.SCHEMA.read_text() == make_schema.rendered(), (
        "python -m deploy.helm.make_schema writes it anew"
    )


def test_values_schema_covers_every_setting_once() -> None:
    for cls, owned in schema_parts.OWNED.items():
        fields = set(cls.__dataclass_fields__)
        offered = set(schema_parts.config(cls)["properties"])

        assert owned <= fields
        assert offered == fields - owned


@_EXAMPLES
def test_rendered_files_hold_settings_that_the_services_accept(path: Path, tmp_path: Path) -> None:
    files = settings_files(chart.manifests(chart.example(path)))

    assert set(files) >= {"gateway.toml", "auth.toml", "cache.toml", "scheduler.toml", "shard.toml"}
    for name, texts in files.items():
        for text in texts:
            (tmp_path / name).write_text(text)
            settings = config_load.load(["--config", str(tmp_path / name)], {})
            assert str(tmp_path / name) in settings.origins.values()


def test_a_setting_that_does_not_exist_is_seen_in_a_rendered_file(tmp_path: Path) -> None:
    text = settings_files(chart.manifests())["gateway.toml"][0]
    (tmp_path / "gateway.toml").write_text(text.replace("usage_dir", "usage_folder"))

    with pytest.raises(ConfigError, match="usage_folder"):
        config_load.load(["--config", str(tmp_path / "gateway.toml")], {})


def test_numbers_and_strings_of_any_kind_arrive_as_they_are(tmp_path: Path) -> None:
    values = {
        "gateway": {
            "config": {
                "max_request_bytes": 268435456,
                "write_timeout_s": 0.25,
                "cache_semantic": False,
                "model_aliases": ['a=<b> & "c" \\ é', "d=e"],
            }
        }
    }
    (tmp_path / "gateway.toml").write_text(
        settings_files(chart.manifests(values))["gateway.toml"][0]
    )

    gateway = config_load.load(["--config", str(tmp_path / "gateway.toml")], {}).gateway

    assert gateway.max_request_bytes == 268435456
    assert gateway.write_timeout_s == 0.25
    assert gateway.cache_semantic is False
    assert gateway.model_aliases == ('a=<b> & "c" \\ é', "d=e")


def settings_files(objects: list[chart.Manifest]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for one in chart.of_kind(objects, "ConfigMap").values():
        for name, text in one["data"].items():
            if not name.endswith(".toml"):  # a dashboard
                continue
            found.setdefault(name, []).append(text)
    return found


def test_a_component_is_replaced_only_where_its_own_settings_changed() -> None:
    def checksums(**values: Any) -> dict[str, str]:
        annotations = {
            name: pod["metadata"].get("annotations", {})
            for name, pod in chart.pods(chart.manifests(values))
        }
        return {name: one["checksum/config"] for name, one in annotations.items() if len(one) == 1}

    before = checksums()
    after = checksums(gateway={"config": {"keepalive_s": 5}})

    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"Deployment/infermesh-gateway"}


def test_schema_is_plain_json_that_helm_reads() -> None:
    with helm_python.Chart.load(chart.CHART) as loaded:
        assert loaded.schema == json.loads(make_schema.rendered())


@pytest.mark.parametrize(
    ("rollout", "name", "other"),
    [
        ("drain", "infermesh-model-chat-11", "infermesh-model-chat-x-1"),
        ("surge", "infermesh-model-chat-7d9f8-abcde", "infermesh-model-chat-x-7d9f8-abcde"),
        ("surge", "infermesh-model-chat-7d9f8-abcde", "infermesh-model-chat-x-1"),
    ],
)
def test_a_model_is_scaled_by_its_own_pods_alone(rollout: str, name: str, other: str) -> None:
    chat = {"name": "chat", "source": "pvc://models/chat", "rollout": rollout}
    values = {
        "models": [{**chat, "autoscaling": {"enabled": True}}],
        "prometheus": {"address": "http://prometheus"},
    }
    scaled = chart.of_kind(chart.manifests(values), "ScaledObject")["infermesh-model-chat"]
    (trigger,) = scaled["spec"]["triggers"]
    (pattern,) = re.findall(r'pod=~"([^"]+)"', trigger["metadata"]["query"])

    assert re.fullmatch(pattern, name)
    assert not re.fullmatch(pattern, other)
