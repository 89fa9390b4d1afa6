"""The runbooks: what they tell an operator to type, ask or set exists."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from infermesh.cli import app
from infermesh.config import Settings
from tests.deploy import queries
from tests.deploy.chart import CHART, ROOT
from tests.deploy.test_alerts import known

PAGES = sorted((ROOT / "docs" / "runbooks").glob("Infermesh*.md"))
GUIDE = ROOT / "docs" / "telemetry.md"
PARTS = ("**What users feel.**", "**What it means.**", "## Look at", "## Do now",
         "## Mend for good", "## Over when")  # fmt: skip
SECTIONS = {field.name: field.type for field in dataclasses.fields(Settings)}
_FENCE = re.compile(r"```(\w+)\n(.*?)```", re.S)
_CODE = re.compile(r"`([^`\n]+)`")
_SETTING = re.compile(rf"\b({'|'.join(set(SECTIONS) - {'origins'})})\.([a-z_]+)\b")


def commands(text: str) -> Iterator[list[str]]:
    """Every command line of `infermesh`, in blocks and between words."""
    blocks = [
        line for kind, body in _FENCE.findall(text) if kind == "sh" for line in body.split("\n")
    ]
    for line in [*blocks, *_CODE.findall(_FENCE.sub("", text))]:
        if re.match(r"\s*infermesh [a-z]", line):
            yield shlex.split(line.strip())[1:]


def refusal(words: list[str]) -> str | None:
    """Why the command line takes no such words, or None."""
    command = typer.main.get_command(app)
    rest = list(words)
    while isinstance(command, TyperGroup) and rest:
        found = command.commands.get(rest[0])
        if found is None:
            return f"there is no command {rest[0]}"
        command = found
        rest.pop(0)
    flags = {flag for parameter in command.params for flag in (*parameter.opts, "--help")}
    return next(
        (f"{word} is no flag" for word in rest if word[:1] == "-" and word not in flags), None
    )


def expressions(text: str) -> Iterator[str]:
    """Every query: a line of a promql block, or code that names a metric and is no prose."""
    for kind, body in _FENCE.findall(text):
        if kind == "promql":
            yield from filter(None, (line.strip() for line in body.split("\n")))
    for code in _CODE.findall(_FENCE.sub("", text)):
        if re.search(r"\binfermesh(_|:\w+:)", code):
            yield code


def missing_settings(text: str) -> list[str]:
    return [
        f"{section}.{name}"
        for section, name in _SETTING.findall("\n".join(_CODE.findall(_FENCE.sub("", text))))
        if name not in {f.name for f in dataclasses.fields(type(getattr(Settings(), section)))}
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_has_every_part_on_one_page(page: Path) -> None:
    text = page.read_text()
    places = [text.index(part) for part in PARTS]
    assert places == sorted(places)
    assert len(text.splitlines()) <= 70


@pytest.mark.parametrize("page", [*PAGES, GUIDE], ids=lambda page: page.stem)
def test_page_names_what_exists(page: Path) -> None:
    text = page.read_text()
    assert [why for words in commands(text) if (why := refusal(words))] == []
    assert [why for one in expressions(text) for why in queries.complaints(one, known())] == []
    assert missing_settings(text) == []
    links = re.findall(r"\]\((\w+\.md)\)", text)
    assert [link for link in links if not (page.parent / link).is_file()] == []


def test_components_in_runbooks_are_the_charts() -> None:
    text = "".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"app\.kubernetes\.io/component=(\w+)", text))
    templates = "".join(path.read_text() for path in (CHART / "templates").glob("*.*"))
    assert named
    assert {one for one in named if f'"{one}"' not in templates} == set()


def test_what_does_not_exist_is_found() -> None:
    assert refusal(["usage", "--since", "1h"]) is None
    assert refusal(["heal"]) == "there is no command heal"
    assert refusal(["tenants", "melt"]) == "there is no command melt"
    assert refusal(["usage", "--until", "1h"]) == "--until is no flag"
    assert list(commands("a `infermesh usage --json`\n```sh\n  infermesh up\n```")) == [
        ["up"],
        ["usage", "--json"],
    ]
    assert missing_settings("`scheduler.max_num_seqs`, `scheduler.max_seqs`") == [
        "scheduler.max_seqs"
    ]
    assert list(expressions("`infermesh_x` and\n```promql\nup\n```")) == ["up", "infermesh_x"]
