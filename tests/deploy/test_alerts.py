"""The alerts: recorded series fire them or not; each has a page; nothing is invented."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from infermesh import errors
from tests import prometheus
from tests.deploy import queries
from tests.deploy.chart import CHART, ROOT

RULES = sorted((CHART / "alerts").glob("*.yaml"))
CASES = sorted((Path(__file__).parent / "alerts").glob("*.yaml"))
GROUPS: list[dict[str, Any]] = [
    group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]
]
ALL = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = [rule for rule in ALL if "alert" in rule]
RECORDED = {rule["record"]: rule for rule in ALL if "record" in rule}


def promtool(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [prometheus.program("promtool"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def known() -> dict[str, frozenset[str]]:
    """What services export and what rules record, with labels."""
    found = queries.exported()
    for name, rule in RECORDED.items():
        sources = [s.metric for s in queries.selections(rule["expr"])]
        own = frozenset().union(*(found.get(source, frozenset()) for source in sources))
        found[name] = own
    return found


def test_promtool_takes_the_rules() -> None:
    done = promtool("check", "rules", *RULES)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "path",
    [
        # many evaluations; what they show of a rule does not change from day to day
        pytest.param(path, marks=[pytest.mark.slow] if path.stem.endswith("_days") else [])
        for path in CASES
    ],
    ids=lambda path: path.stem,
)
def test_alerts_fire_as_recorded_series_say(path: Path) -> None:
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    fires, silent = set(), set()
    for path in CASES:
        for group in yaml.safe_load(path.read_text())["tests"]:
            for case in group["alert_rule_test"]:
                (fires if case["exp_alerts"] else silent).add(case["alertname"])
    names = {rule["alert"] for rule in ALERTS}
    assert fires == names
    assert silent == names


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: rule.get("alert") or rule.get("record"))
def test_rule_names_what_is_exported(rule: dict[str, Any]) -> None:
    assert not list(queries.complaints(rule["expr"], known()))


def test_rules_record_before_they_use() -> None:
    # a group's rules run in order; another group's value would be an interval old
    for group in GROUPS:
        here: set[str] = set()
        for rule in group["rules"]:
            used = {s.metric for s in queries.selections(rule["expr"])} & RECORDED.keys()
            assert used <= here, rule
            here.add(rule.get("record", ""))


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_alert_says_how_bad_what_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    notes = rule["annotations"]
    assert {"summary", "description", "runbook_url"} == notes.keys()
    page = ROOT / notes["runbook_url"]
    assert page.is_file()
    assert f"`{rule['alert']}`" in page.read_text()


def test_codes_in_rules_are_those_of_errors() -> None:
    text = "".join(path.read_text() for path in RULES)
    codes = {
        cls(
            "",
        ).code
        for cls in errors.error_classes()
    }
    named = set(re.findall(r'result=~?"([a-z_|]+)"', text))
    assert {one for group in named for one in group.split("|")} <= codes


def test_page_of_a_runbook_is_an_alerts() -> None:
    wanted = {rule["annotations"]["runbook_url"] for rule in ALERTS}
    found = {f"docs/runbooks/{p.name}" for p in (ROOT / "docs" / "runbooks").glob("Infermesh*.md")}
    assert found == wanted


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("rate(infermesh_step_total[5m])", "nobody exports infermesh_step_total"),
        ('infermesh_steps_total{model="m"}', "no label model"),
        ("sum by (tenant) (infermesh_steps_total)", "has a label tenant"),
        ("sum by (endpoint) (infermesh_requests_total)", "has a label endpoint"),
        ("infermesh_time_to_first_token_seconds > 1", "nobody exports infermesh_time_to_first"),
        ("infermesh_steps_total * on (model) infermesh_steps_total", "has a label model"),
    ],
)
def test_what_is_not_exported_is_found(expression: str, complaint: str) -> None:
    assert any(complaint in found for found in queries.complaints(expression, known()))
