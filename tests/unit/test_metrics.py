"""The metrics of every service: their names, their labels, and the page that lists them."""

import pytest

from infermesh.telemetry import metrics
from infermesh.telemetry.metrics import OTHER, BoundedLabel
from tests import metrics_table
from tests.metric_rules import problems, promtool_problems, series


def test_page_lists_every_metric_of_every_service() -> None:
    assert metrics_table.PAGE.read_text() == metrics_table.page(), "run `make metrics-table`"


def test_all_metrics_follow_the_conventions() -> None:
    metrics_table.listed()
    text = metrics.exposition()[0].decode()
    assert "infermesh_num_requests_running" in text
    assert problems(text) == []
    assert promtool_problems(text) == ""


@pytest.mark.parametrize(
    ("name_and_type", "wrong"),
    [
        ("infermesh_x counter", "_total"),
        ("infermesh_x_total gauge", "is no counter"),
        ("infermesh_x_ms gauge", "base unit"),
        ("infermesh_seconds_x gauge", "end in its unit"),
        ("infermesh_gauge gauge", "names its type"),
        ("x gauge", "begin with"),
    ],
)
def test_rules_name_what_is_wrong(name_and_type: str, wrong: str) -> None:
    name = name_and_type.split()[0]
    text = f"# HELP {name} A.\n# TYPE {name_and_type}\n{name} 1\n"
    (found, *_) = problems(text)
    assert wrong in found


def test_rules_want_a_help_and_bounded_labels() -> None:
    text = '# HELP infermesh_x a\n# TYPE infermesh_x gauge\ninfermesh_x{tenant="a"} 1\n'
    helpless, unbounded = problems(text)
    assert "no sentence" in helpless
    assert "nothing bounds" in unbounded


def test_bounded_label_calls_what_comes_late_other() -> None:
    label = BoundedLabel(2)
    assert [label.of(value) for value in "abca"] == ["a", "b", OTHER, "a"]


def test_series_tells_labels_apart() -> None:
    metrics.counter("probe_series_total", "Of this test.", ("by",)).labels("one").inc()
    before = series(metrics.exposition()[0].decode())
    metrics.counter("probe_series_total", "Of this test.", ("by",)).labels("two").inc()
    (new,) = series(metrics.exposition()[0].decode()) - before
    assert new == ("infermesh_probe_series_total", (("by", "two"),))
