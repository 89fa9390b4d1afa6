"""A real Prometheus beside a mesh that answers: rules and dashboards have something to say."""

import contextlib
import itertools
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml

from tests import prometheus
from tests.deploy import test_dashboards as dashboards
from tests.deploy.test_alerts import ALERTS, RULES
from tests.e2e.mesh_process import Mesh, wait_until

# Panels, and queries of panels, that are empty where nothing is wrong or nothing is limited.
QUIET = {
    "Alerts that fire",
    "Attempts that went on elsewhere: {{reason}}",
    "Budgets of 30 days, how fast they burn: failed {{model}}",
    "Callers refused",
    "Calls between services that failed",
    "Certificates, time left",
    "Failed requests, share",
    "Looks for replicas that failed",
    "Quota",
    "Refused by replicas",
    "Refused for want of room",
    "What keeps the next request out",
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[prometheus.Prometheus]:
    """A Prometheus that has scraped a loaded mesh of two replicas often enough for rates."""
    flags = ("--engine", "simulated", "--replicas", "2")
    with Mesh(tmp_path_factory.mktemp("mesh"), *flags) as mesh, contextlib.ExitStack() as stack:
        # the cache comes after the mesh can answer, and is no target before
        wait_until(lambda: mesh.metric("gateway", "cache_connected") == 1, 60)
        targets = _targets(mesh)
        server = stack.enter_context(prometheus.running_prometheus(_config(targets)))
        wait_until(lambda: _up(server) == targets, 60, f"{targets} are up")
        questions = (f"{'Once upon a time. ' * 20}What is {n // 2}?" for n in itertools.count())
        client = mesh.openai()

        def is_drawn() -> bool:
            _ask(client, mesh.model, next(questions))
            return all(server.query(one) for one in _LAST_TO_COME)

        wait_until(is_drawn, 120, "rates of what was asked")
        yield server


# Rates of what the load causes last: hits of the cache on both tiers' way, and recorded burns.
_LAST_TO_COME = (
    'rate(infermesh_cache_requests_total{outcome="hit"}[5m]) > 0',
    "sum(rate(infermesh_usage_records_stored_total[5m])) > 0",
    "infermesh:next_token_budget:burn_rate1h",
    "sum(rate(infermesh_prefix_cache_hits_total[5m])) > 0",
)


def _ask(client: openai.OpenAI, model: str, question: str) -> None:
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        stream=True,
        temperature=0,
        max_tokens=16,
    )
    assert list(stream)


def _up(server: prometheus.Prometheus) -> list[str]:
    # once is enough: a busy machine lets a scrape be late now and then
    return sorted(one["metric"]["instance"] for one in server.query("max_over_time(up[5m]) == 1"))


def _targets(mesh: Mesh) -> list[str]:
    others = [one["metrics"] for one in mesh.facts["services"] if one.get("metrics")]
    return sorted({mesh.facts["admin_url"].removeprefix("http://"), *others})


def _config(targets: list[str]) -> str:
    return yaml.safe_dump(
        {
            "global": {"scrape_interval": "3s", "evaluation_interval": "3s"},
            "rule_files": [str(path) for path in RULES],
            "scrape_configs": [{"job_name": "infermesh", "static_configs": [{"targets": targets}]}],
        }
    )


@pytest.mark.slow
def test_rules_run_and_no_alert_fires_on_a_mesh_that_is_well(
    asked: prometheus.Prometheus,
) -> None:
    rules = asked.rules()
    assert {rule["name"] for rule in rules} >= {rule["alert"] for rule in ALERTS}
    assert [rule for rule in rules if rule["health"] != "ok"] == []
    assert asked.query('ALERTS{alertstate="firing"}') == []


@pytest.mark.slow
@pytest.mark.parametrize("path", dashboards.FILES, ids=lambda path: path.stem)
def test_every_panel_draws_something_that_is_not_quiet_by_nature(
    asked: prometheus.Prometheus, path: Path
) -> None:
    empty, drawn = set(), set()
    for panel in dashboards.drawn(path):
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "5m")
            try:
                found = asked.query(expression.replace("$namespace", ".*"))
            except urllib.error.HTTPError as error:
                raise AssertionError(f"{expression}: {error.read().decode()}") from error
            name = f"{panel['title']}: {target['legendFormat']}"
            quiet = panel["title"] in QUIET or name in QUIET
            (drawn if found else set() if quiet else empty).add(name)
    assert drawn
    assert empty == set()
