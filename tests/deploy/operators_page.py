"""The lines of docs/operators.md, and whether what they name exists."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml

from infermesh.cli import app
from tests.deploy import chart
from tests.deploy.dockerfile import instructions

PAGE = (chart.ROOT / "docs" / "operators.md").read_text()
_EXAMPLE = chart.CHART / "examples" / "cpu-demo.yaml"
_KINDS = {
    "deploy": "Deployment",
    "statefulset": "StatefulSet",
    "svc": "Service",
    "secret": "Secret",
    "pvc": "PersistentVolumeClaim",
}
_WITH_VALUE = ("-f", "--set", "-n", "--namespace")


class Wrong(Exception):
    """A line names something that does not exist."""


def blocks(page: str, language: str) -> list[str]:
    """What stands between fences of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.M | re.S)


def lines(page: str) -> Iterator[str]:
    """Every command line, continued ones joined; of `X=$(…)` what is inside."""
    for one in blocks(page, "sh"):
        for line in one.replace("\\\n", " ").splitlines():
            inner = re.fullmatch(r"export \w+=\$\((.*)\)", line.strip())
            yield inner[1] if inner else line.strip()


def values(page: str) -> list[dict[str, Any]]:
    """Every block of values."""
    return [yaml.safe_load(one) for one in blocks(page, "yaml")]


def check(line: str) -> None:
    """Raises Wrong, or what Helm says of values that it refuses."""
    words = shlex.split(line.removesuffix("&"))
    tool = words[0]
    if tool == "docker":
        _check_docker(words)
    elif tool == "helm":
        _check_helm(words)
    elif tool == "kubectl":
        _check_kubectl(words)
    elif tool == "python":
        _check_inside(words)
    elif tool not in ("curl", "cd"):  # those are run as they stand
        raise Wrong(f"what is {tool}?")


def _flag(words: list[str], *names: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words) if word in names]


def _check_docker(words: list[str]) -> None:
    if words[1] == "push":
        return
    text = (chart.ROOT / "deploy" / "Dockerfile").read_text()
    stages = {rest.partition(" AS ")[2] for word, rest in instructions(text) if word == "FROM"}
    if (
        set(_flag(words, "--target")) - stages
        or not Path(chart.ROOT, *_flag(words, "-f")).is_file()
    ):
        raise Wrong(" ".join(words))


def _check_helm(words: list[str]) -> None:
    given: dict[str, Any] = {}
    for path in _flag(words, "-f"):
        given |= yaml.safe_load((chart.ROOT / path).read_text())
    for one in _flag(words, "--set"):
        path, _, value = one.partition("=")
        *folders, name = path.split(".")
        place = given
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = yaml.safe_load(value)
    if given:
        chart.texts(given)
    pairs = itertools.pairwise(words)
    named = [word for before, word in pairs if before not in _WITH_VALUE and word[0] != "-"]
    verb, *release_and_chart = named
    release, path_of_chart = release_and_chart[:1], release_and_chart[1:]
    if verb not in ("install", "upgrade", "test", "rollback", "uninstall"):
        raise Wrong(f"helm {verb}")
    if release != [chart.RELEASE] or _flag(words, "-n", "--namespace") != [chart.NAMESPACE]:
        raise Wrong(f"{release} is not the release of this page")
    if [one for one in path_of_chart if (chart.ROOT / one) != chart.CHART]:
        raise Wrong(f"{path_of_chart} is no chart")


def _check_kubectl(words: list[str]) -> None:
    if _flag(words, "-n") != [chart.NAMESPACE]:
        raise Wrong("another namespace")
    objects = chart.manifests(chart.example(_EXAMPLE))
    own = words[: words.index("--")] if "--" in words else words
    for kind, name in (word.split("/", 1) for word in own if re.match(r"[a-z]+/", word)):
        if name not in chart.of_kind(objects, _KINDS[kind]):
            raise Wrong(f"there is no {kind}/{name}")
    if own[3:5] == ["get", "secret"]:
        (key,) = re.findall(r"\{\.data\.([\w-]+)\}", " ".join(own))
        if key not in chart.of_kind(objects, "Secret")[own[5]]["data"]:
            raise Wrong(f"{own[5]} has no {key}")
    if own[3:5] == ["create", "secret"]:
        _check_certificate(own[6], own[7])
    if own[3] == "port-forward":
        service = chart.of_kind(objects, "Service")[own[4].split("/")[1]]
        if int(own[5].split(":")[1]) not in {one["port"] for one in service["spec"]["ports"]}:
            raise Wrong(f"{own[4]} has no port {own[5]}")
    if own != words:
        _check_inside(words[len(own) + 1 :])


def _check_certificate(secret: str, flag: str) -> None:
    """The Secret is one that the page's own values name, for the identity whose files it has."""
    (named,) = [one["tls"]["secrets"] for one in values(PAGE) if "tls" in one]
    if named.get(flag.removeprefix("--from-file=certs/")) != secret:
        raise Wrong(f"{secret} with {flag}")


def _check_inside(words: list[str]) -> None:
    """A command of `infermesh` as a pod has it, its flags included."""
    if words[:3] != ["python", "-m", "infermesh.cli"]:
        raise Wrong(" ".join(words))
    command, rest = typer.main.get_command(app), words[3:]
    while hasattr(command, "commands"):
        found = command.commands.get(rest[0])
        if found is None:
            raise Wrong(f"infermesh has no {rest[0]}")
        command, rest = found, rest[1:]
    try:
        command.make_context("infermesh", rest)
    except Exception as error:  # click's own, of which typer carries a copy
        raise Wrong(str(error)) from error
