"""Prometheus and Grafana are given what lies in the chart, as it is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy import chart

_ALL: dict[str, Any] = {
    kind: {"enabled": True} for kind in ("podMonitor", "prometheusRule", "dashboards")
}
# What alerts have that a template could spoil: braces, blocks, signs of its own.
_RULES = """\
# a comment
groups:
  - name: test
    rules:
      - alert: Test
        expr: >-
          sum by (job) (rate(infermesh_requests_total{status=~"5.."}[5m]))
          / 0.01 > 1
        annotations:
          summary: "{{ $labels.job }} is at {{ $value | humanize }}, `100 %`"
"""
_DASHBOARD = '{"title": "{{model}} \\u00e9", "panels": [{"expr": "up{job=~\\"$job\\"}"}]}\n'


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The chart with an alert and a dashboard that are these tests' own."""
    folder = tmp_path / "infermesh"
    shutil.copytree(chart.CHART, folder, ignore=shutil.ignore_patterns("alerts", "dashboards"))
    (folder / "alerts").mkdir()
    (folder / "alerts" / "test.yaml").write_text(_RULES)
    (folder / "dashboards").mkdir()
    (folder / "dashboards" / "overview.json").write_text(_DASHBOARD)
    return folder


def test_alerts_of_the_chart_are_rules_as_they_are(copied: Path) -> None:
    values = {"monitoring": {**_ALL, "prometheusRule": {"enabled": True, "labels": {"to": "me"}}}}

    (rule,) = chart.of_kind(chart.manifests(values, copied), "PrometheusRule").values()

    assert rule["metadata"]["name"] == "infermesh-test"
    assert rule["metadata"]["labels"]["to"] == "me"
    assert rule["spec"] == yaml.safe_load(_RULES)


def test_dashboards_of_the_chart_are_what_grafanas_sidecar_looks_for(copied: Path) -> None:
    annotations = {"grafana_folder": "Models"}
    values = {"monitoring": {"dashboards": {"enabled": True, "annotations": annotations}}}

    maps = chart.of_kind(chart.manifests(values, copied), "ConfigMap")
    found = maps["infermesh-dashboard-overview"]

    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert found["metadata"]["annotations"] == annotations
    assert found["data"]["overview.json"] == _DASHBOARD.strip()
    assert json.loads(found["data"]["overview.json"])["title"] == "{{model}} é"


@pytest.mark.parametrize("name", sorted(_ALL))
def test_each_is_there_where_it_is_asked_for_alone(copied: Path, name: str) -> None:
    def seen(values: dict[str, Any]) -> set[tuple[str, str]]:
        objects = chart.manifests(values, copied)
        return {(one["kind"], one["metadata"]["name"]) for one in objects}

    more = seen({"monitoring": {name: {"enabled": True}}}) - seen({})

    expected = {
        "podMonitor": {("PodMonitor", "infermesh")},
        "prometheusRule": {("PrometheusRule", "infermesh-test")},
        "dashboards": {("ConfigMap", "infermesh-dashboard-overview")},
    }
    assert more == expected[name]


def test_every_file_that_the_chart_has_is_rendered() -> None:
    objects = chart.manifests({"monitoring": _ALL})

    rules = chart.of_kind(objects, "PrometheusRule")
    assert {name: one["spec"] for name, one in rules.items()} == {
        f"infermesh-{path.stem}".removesuffix("-infermesh"): yaml.safe_load(path.read_text())
        for path in (chart.CHART / "alerts").glob("*.yaml")
    }
    boards = chart.of_kind(objects, "ConfigMap")
    for path in (chart.CHART / "dashboards").glob("*.json"):
        data = boards[f"infermesh-dashboard-{path.stem}"]["data"]
        assert json.loads(data[path.name]) == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("values", "job"),
    [({}, "infermesh"), ({"fullnameOverride": "chat"}, "infermesh-chat")],
)
def test_scrapes_have_a_job_that_alerts_know_a_mesh_by(values: dict[str, Any], job: str) -> None:
    objects = chart.manifests({**values, "monitoring": _ALL})
    (monitor,) = chart.of_kind(objects, "PodMonitor").values()

    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": job}]
        # else the operator's label `endpoint` hides a service's own
        assert endpoint["honorLabels"] is True


def test_triggers_are_authenticated_where_prometheus_wants_it() -> None:
    authentication = {"name": "prometheus", "kind": "ClusterTriggerAuthentication"}
    values = {
        "gateway": {"autoscaling": {"enabled": True}},
        "prometheus": {"address": "https://prometheus", "authentication": authentication},
    }

    (scaled,) = chart.of_kind(chart.manifests(values), "ScaledObject").values()

    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["authenticationRef"] == authentication
    behavior = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior == {"scaleDown": {"stabilizationWindowSeconds": 120}}
