"""deploy/compose.yaml is what Compose's own schema allows, and its parts know each other."""

import copy
import json
import re
from importlib import resources
from typing import Any

import jsonschema
import pytest
import yaml

from tests.deploy import chart, compose

_SCHEMA = json.loads(
    resources.files("check_jsonschema")
    .joinpath("builtin_schemas/vendor/compose-spec.json")
    .read_text()
)
_ENVIRONMENT = {"POSTGRES_PASSWORD": "word", "GRAFANA_PASSWORD": "word"}


@pytest.fixture
def content() -> dict[str, Any]:
    return compose.load(_ENVIRONMENT)


def test_compose_file_is_valid_for_composes_own_schema(content: dict[str, Any]) -> None:
    jsonschema.validate(content, _SCHEMA)


@pytest.mark.parametrize(
    "change",
    [
        lambda services: services["gateway"].update(comand=["python"]),
        lambda services: services["grafana"].update(ports=[{"target": "x" * 3, "host": 1}]),
        lambda services: services["redis"].update(tmpfs={"path": "/data"}),
        lambda services: services["auth"]["depends_on"]["redis"].update(condition="healthy"),
    ],
    ids=["key", "ports", "tmpfs", "condition"],
)
def test_the_schema_sees_what_compose_would_refuse(content: dict[str, Any], change: Any) -> None:
    changed = copy.deepcopy(content)
    change(changed["services"])

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed, _SCHEMA)


def test_images_of_others_are_of_one_version(content: dict[str, Any]) -> None:
    for name in compose.FOREIGN:
        image = content["services"][name]["image"]
        assert re.fullmatch(r"[\w./-]+(:v?\d+\.\d+\.?\d*(-alpine)?|@sha256:[0-9a-f]{64})", image), (
            image
        )


def test_what_services_name_is_declared_and_used(content: dict[str, Any]) -> None:
    services = content["services"].values()
    used = {
        "volumes": {v.partition(":")[0] for s in services for v in s.get("volumes", ())},
        "networks": {n for s in services for n in s.get("networks", ()) if n != "default"},
        "configs": {one["source"] for s in services for one in s.get("configs", ())},
        "secrets": {one for s in services for one in s.get("secrets", ())},
    }
    folders = {one for one in used["volumes"] if one.startswith("./")}
    used["volumes"] -= folders

    assert {kind: set(content[kind]) for kind in used} == used
    for folder in folders:
        assert (compose.FILE.parent / folder).parent == chart.CHART
    wanted = {name for s in services for name in s.get("depends_on", ())}
    assert all("healthcheck" in content["services"][name] for name in wanted)


def test_databases_are_reached_by_auth_alone(content: dict[str, Any]) -> None:
    services = content["services"]

    assert {n for n, s in services.items() if "databases" in s.get("networks", ())} == {
        *("auth", "postgres", "redis")
    }
    assert services["postgres"]["networks"] == services["redis"]["networks"] == ["databases"]
    assert "default" in services["auth"]["networks"]


def test_grafana_and_prometheus_are_given_what_the_chart_has(content: dict[str, Any]) -> None:
    def mounted(name: str) -> dict[str, str]:
        volumes = (one.split(":") for one in content["services"][name]["volumes"])
        return {target: source for source, target, *_ in volumes}

    def config(name: str) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load(content["configs"][name]["content"])
        return found

    (rules,) = config("prometheus")["rule_files"]
    assert mounted("prometheus")[rules.removesuffix("/*.yaml")] == "./helm/infermesh/alerts"
    (provider,) = config("grafana-dashboards")["providers"]
    assert mounted("grafana")[provider["options"]["path"]] == "./helm/infermesh/dashboards"
    (source,) = config("grafana-datasources")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert content["services"]["prometheus"]["ports"] == ["127.0.0.1:9090:9090"]
