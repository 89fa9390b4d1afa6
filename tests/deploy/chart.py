"""The Helm chart, rendered by Helm's own library, as the tests look at it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "infermesh"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
RELEASE, NAMESPACE = "infermesh", "mesh"
# libyaml's, where it is
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# A Secret that the chart draws is another one each time.
_DRAWN = re.compile(r"^(  api-key: ).+$", re.M)

Manifest = dict[str, Any]
Values = Mapping[str, Any]


def example(path: Path) -> dict[str, Any]:
    """An example's values."""
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    return values


def texts(values: Values | None = None, chart: Path = CHART) -> dict[str, str]:
    """What every template becomes, by its path. Raises HelmError where values are refused."""
    return dict(_rendered(json.dumps(values or {}), chart))


@functools.lru_cache(maxsize=64)
def _rendered(values: str, chart: Path) -> Mapping[str, str]:
    """Most tests look at one of few renderings, each of which takes a while."""
    with helm_python.Chart.load(chart) as loaded:
        loaded.validate_schema(json.loads(values))
        return loaded.render(json.loads(values), name=RELEASE, namespace=NAMESPACE)


def manifests(values: Values | None = None, chart: Path = CHART) -> list[Manifest]:
    """All objects."""
    found: list[Manifest] = []
    for path, text in texts(values, chart).items():
        if not path.endswith("NOTES.txt"):
            found += filter(None, yaml.load_all(text, _Loader))
    return found


def snapshot(values: Values) -> str:
    """One text of everything that is rendered, the same each time."""
    parts = []
    for path, text in sorted(texts(values).items()):
        kept = "\n".join(line.rstrip() for line in text.strip().splitlines())
        if kept:
            masked = _DRAWN.sub(r"\1<drawn>", kept)
            parts.append(f"# {path.removeprefix('infermesh/')}\n{masked}\n")
    return "\n".join(parts)


def pods(objects: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Every pod or template of one: `Kind/name`, and what it is."""
    for one in objects:
        name = f"{one['kind']}/{one['metadata']['name']}"
        if one["kind"] == "Pod":
            yield name, one
        elif "template" in one.get("spec", {}):
            yield name, one["spec"]["template"]


def of_kind(objects: list[Manifest], kind: str) -> dict[str, Manifest]:
    """Objects of a kind, by name."""
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}
