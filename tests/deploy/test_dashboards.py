"""The dashboards: made from their descriptions, laid out, and drawing what is really exported."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from deploy.helm import make_dashboards
from tests.deploy import queries
from tests.deploy.test_alerts import known

FILES = sorted(make_dashboards.FOLDER.glob("*.json"))
# Of Grafana's units: seconds, bytes, rates, a share of 1, a plain number.
UNITS = {"s", "bytes", "reqps", "ops", "percentunit", "none"}


def read(path: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(path.read_text())
    return made


def drawn(path: Path) -> list[dict[str, Any]]:
    """Panels that draw something."""
    return [panel for panel in read(path)["panels"] if panel["type"] != "row"]


def expressions(path: Path) -> list[str]:
    """Every query of a dashboard as Prometheus gets it, with everything chosen."""
    found = [target["expr"] for panel in drawn(path) for target in panel["targets"]]
    return [one.replace("$__rate_interval", "5m").replace("$namespace", ".*") for one in found]


def test_files_are_those_of_the_descriptions() -> None:
    assert {path.name: path.read_text() for path in FILES} == make_dashboards.texts(), (
        "`make chart-files` writes them anew"
    )


def test_every_dashboard_has_a_name_of_its_own() -> None:
    for key in ("uid", "title"):
        assert len({read(path)[key] for path in FILES}) == len(FILES) >= 3


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_panels_have_ids_of_their_own_and_do_not_overlap(path: Path) -> None:
    panels = read(path)["panels"]
    assert max(Counter(panel["id"] for panel in panels).values()) == 1
    cells: Counter[tuple[int, int]] = Counter()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        columns = range(place["x"], place["x"] + place["w"])
        cells.update(itertools.product(columns, range(place["y"], place["y"] + place["h"])))
    assert max(cells.values()) == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_panels_say_their_unit_and_ask_the_chosen_datasource(path: Path) -> None:
    for panel in drawn(path):
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert {source["uid"] for source in sources} == {"${datasource}"}
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_units_are_those_of_the_metrics(path: Path) -> None:
    for panel in drawn(path):
        unit = panel["fieldConfig"]["defaults"]["unit"]
        for expression in (target["expr"] for target in panel["targets"]):
            if "histogram_quantile" in expression:
                assert ("_seconds_bucket" in expression) == (unit == "s"), panel["title"]
            elif re.fullmatch(r"(infermesh|process)_\w+_bytes\{.*\}", expression):
                assert unit == "bytes", panel["title"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_queries_name_what_is_exported_and_only_the_chosen_mesh(path: Path) -> None:
    for expression in expressions(path):
        assert list(queries.complaints(expression, known())) == [], expression
        for selection in queries.selections(expression):
            assert ("namespace", ".*") in selection.matchers, expression


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_legends_name_labels_that_the_query_keeps(path: Path) -> None:
    for panel in drawn(path):
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            grouped = queries.grouped_by(target["expr"].replace("$__rate_interval", "5m"))
            own = {
                label
                for one in queries.selections(target["expr"].replace("$__rate_interval", "5m"))
                for label in known()[one.metric] | queries.TARGET_LABELS
            }
            assert named <= (grouped or own), (panel["title"], target)
