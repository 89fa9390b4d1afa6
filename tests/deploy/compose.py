"""deploy/compose.yaml as pods and services, so that it can run as processes, too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "deploy" / "compose.yaml"
# Of other projects.
FOREIGN = ("postgres", "redis", "prometheus", "grafana")
_VARIABLE = re.compile(r"\$\{(\w+)(?::\?[^}]*)?\}")


def load(environment: Mapping[str, str]) -> dict[str, Any]:
    """The file with its variables in place. Raises KeyError for one that is not set."""
    text = _VARIABLE.sub(lambda match: environment[match[1]], FILE.read_text())
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def manifests(content: Mapping[str, Any], secret_settings: frozenset[str]) -> list[dict[str, Any]]:
    """Our services as Deployments and Services, named volumes shared among them.

    Args:
        secret_settings: environment that stands in a Secret named as it is.
    """
    found: list[dict[str, Any]] = []
    for name, service in content["services"].items():
        if name in FOREIGN:
            continue
        labels = {"service": name}
        meta = {"name": name, "labels": labels}
        spec = {"containers": [_container(name, service, secret_settings)]}
        spec |= {"volumes": _volumes(service), "enableServiceLinks": False}
        spec["terminationGracePeriodSeconds"] = _seconds(service.get("stop_grace_period", "10s"))
        template = {"metadata": meta, "spec": spec}
        found.append({"kind": "Deployment", "metadata": meta, "spec": {"template": template}})
        headless = {"clusterIP": "None", "selector": labels}
        found.append({"kind": "Service", "metadata": meta, "spec": headless})
    return found


def _container(
    name: str, service: Mapping[str, Any], secret_settings: frozenset[str]
) -> dict[str, Any]:
    environment = [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": key, "key": "value"}}}
        if key in secret_settings
        else {"name": key, "value": value}
        for key, value in service["environment"].items()
    ]
    health = service["healthcheck"]
    assert health["test"][0] == "CMD"
    probe = {
        "exec": {"command": health["test"][1:]},
        "periodSeconds": 1,
        "timeoutSeconds": _seconds(health["timeout"]),
        "failureThreshold": _seconds(health["start_period"]),
    }
    mounts = [{"name": one, "mountPath": path} for one, path in _places(service).items()]
    return {
        "name": name,
        "command": service["command"],
        "env": environment,
        "volumeMounts": mounts,
        "startupProbe": probe,
        "readinessProbe": probe,
    }


def _places(service: Mapping[str, Any]) -> dict[str, str]:
    """Volume to path."""
    named = dict(one.split(":")[:2] for one in service.get("volumes", ()))
    scratch = {path.strip("/").replace("/", "-"): path for path in service["tmpfs"]}
    secrets = {"secrets": "/run/secrets"} if service.get("secrets") else {}
    return {**named, **scratch, **secrets}


def _volumes(service: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = set(_places(service)) - {"secrets"}
    found: list[dict[str, Any]] = [{"name": name, "emptyDir": {}} for name in sorted(names)]
    if service.get("secrets"):
        found.append({"name": "secrets", "secret": {"secretName": "secrets"}})
    return found


def _seconds(text: str) -> int:
    return int(text.removesuffix("s"))
