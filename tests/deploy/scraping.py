"""Scrapes running pods as Prometheus' operator would have Prometheus do it, by a PodMonitor."""

from __future__ import annotations

import urllib.request
from http.client import HTTPException
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.rendered_pods import Manifest, Pod

_TIMEOUT_S = 10.0


def targets(monitor: Manifest, pods: list[Pod]) -> dict[str, str]:
    """`POD/CONTAINER` to the URL that would be scraped, of the pods that it selects.

    A port that no container of a pod has is no target: the operator says nothing then.
    """
    spec = monitor["spec"]
    wanted = spec["selector"]["matchLabels"].items()
    found = {}
    for pod in pods:
        if not wanted <= pod.labels.items():
            continue
        for endpoint in spec["podMetricsEndpoints"]:
            for container in pod.containers:
                if endpoint["port"] in {one["name"] for one in container.get("ports", ())}:
                    port = pod.port(endpoint["port"], [container])
                    where = f"{endpoint['scheme']}://{pod.address}:{port}{endpoint['path']}"
                    found[f"{pod.name}/{container['name']}"] = where
    return found


def scrape(url: str) -> dict[str, set[str]]:
    """Metric to its labels' names.

    Raises:
        OSError: nobody answers, or with an error.
        HTTPException: what answers does not speak HTTP/1.
        ValueError: the answer has no metrics.
    """
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
        text = answer.read().decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    if not found:
        raise ValueError(f"{url} has no metrics: {text[:200]}")
    return found


def scrape_all(monitor: Manifest, pods: list[Pod]) -> dict[str, dict[str, set[str]] | str]:
    """`POD/CONTAINER` of every container to what it exports, or to why nothing could be had."""
    urls = targets(monitor, pods)
    found: dict[str, Any] = {}
    for pod in pods:
        for container in pod.containers:
            name = f"{pod.name}/{container['name']}"
            try:
                found[name] = scrape(urls[name])
            except KeyError:
                found[name] = "not a target"
            except (OSError, ValueError, HTTPException) as error:
                found[name] = repr(error)
    return found
