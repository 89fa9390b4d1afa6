"""A real Prometheus beside a mesh that answers: rules and dashboards have something to say."""

import urllib.error
from collections.abc import Iterator
from pathlib import Path

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
    with Mesh(tmp_path_factory.mktemp("mesh"), "--engine", "simulated", "--replicas", "2") as mesh:
        with prometheus.running_prometheus(_config(mesh)) as server:
            client = mesh.openai()
            wait_until(lambda: len(server.query("up == 1")) == len(_targets(mesh)), 60)

            def ask(question: str) -> None:
                messages = [{"role": "user", "content": question}]
                options = {"temperature": 0, "max_tokens": 16}
                stream = client.chat.completions.create(
                    model=mesh.model, messages=messages, stream=True, **options
                )
                assert list(stream)

            # questions of equal beginnings, each asked twice: prefixes and answers are reused
            asking = (f"{'Once upon a time. ' * 20}What is {n // 2}?" for n in range(10**6))

            def rates_are_known() -> bool:
                ask(next(asking))
                drawn = server.query("rate(infermesh_cache_requests_total{outcome='hit'}[5m]) > 0")
                burns = server.query("infermesh:next_token_budget:burn_rate1h")
                return bool(drawn and burns)

            wait_until(rates_are_known, 90)
            for _ in range(40):
                ask(next(asking))
            seen = server.query("count_over_time(infermesh_requests_inflight[5m])")[0]["value"][1]
            wait_until(
                lambda: (
                    float(
                        server.query("count_over_time(infermesh_requests_inflight[5m])")[0][
                            "value"
                        ][1]
                    )
                    >= float(seen) + 4
                ),
                60,
            )
            yield server


def _targets(mesh: Mesh) -> list[str]:
    others = [one["metrics"] for one in mesh.facts["services"] if one.get("metrics")]
    return sorted({mesh.facts["admin_url"].removeprefix("http://"), *others})


def _config(mesh: Mesh) -> str:
    return yaml.safe_dump(
        {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [
                {"job_name": "infermesh", "static_configs": [{"targets": _targets(mesh)}]}
            ],
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
