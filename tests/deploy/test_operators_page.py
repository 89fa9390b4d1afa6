"""What docs/operators.md tells an operator to type names what exists."""

import subprocess
from pathlib import Path

import helm_python
import pytest

from services.shard.fetch import checksum
from tests.deploy import chart, operators_page
from tests.deploy.operators_page import PAGE, Wrong

_LINES = list(operators_page.lines(PAGE))


@pytest.mark.parametrize("line", _LINES)
def test_every_line_names_what_exists(line: str) -> None:
    operators_page.check(line)


@pytest.mark.parametrize("index", range(len(operators_page.values(PAGE))))
def test_every_block_of_values_is_accepted_by_the_chart(index: int) -> None:
    assert chart.manifests(operators_page.values(PAGE)[index])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--target compute", "--target computer"),
        ("deploy/Dockerfile", "Dockerfile"),
        ("examples/cpu-demo.yaml", "examples/cpu.yaml"),
        ("install infermesh deploy/helm/infermesh", "install infermesh deploy/helm"),
        ("install infermesh", "instal infermesh"),
        ("gateway.replicas=3", "gateway.replica=3"),
        ("global.imageRegistry=registry", "gateway.image.registry=registry"),
        ("statefulset/infermesh-model-demo", "statefulset/infermesh-demo"),
        ("svc/infermesh-gateway 8000:80", "svc/infermesh-gateway 8000:8000"),
        ("get secret infermesh-first-key", "get secret infermesh-key"),
        ("{.data.api-key}", "{.data.key}"),
        ("tenants create team-a", "tenants make team-a"),
        ("keys create --tenant", "keys create --tenants"),
        ("-n mesh exec", "-n infermesh exec"),
        ("test infermesh", "test mesh"),
        ("-auth-tls --from-file=certs/auth", "-auth-tls --from-file=certs/cache"),
        ("cli certs --folder", "cli certificates --folder"),
        ("pvc/infermesh-auth", "pvc/infermesh-cache"),
    ],
)
def test_a_line_that_names_something_else_is_seen(old: str, new: str) -> None:
    changed = PAGE.replace(old, new)
    assert changed != PAGE

    line = next(one for one in operators_page.lines(changed) if one not in _LINES)

    with pytest.raises((Wrong, helm_python.HelmError, KeyError, OSError)):
        operators_page.check(line)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("requestsWaiting: 4", "requestWaiting: 4"),
        ("prometheusRule: {enabled", "prometheusRules: {enabled"),
        ("endpointUrl: ", "endpoint: "),
    ],
)
def test_values_that_the_chart_does_not_have_are_seen(old: str, new: str) -> None:
    changed = PAGE.replace(old, new)
    assert changed != PAGE

    known = operators_page.values(PAGE)
    values = next(one for one in operators_page.values(changed) if one not in known)

    with pytest.raises(helm_python.HelmError):
        chart.texts(values)


def test_the_page_says_of_every_tool_whether_its_lines_were_run() -> None:
    table = PAGE[: PAGE.index("## Images")]

    for line in _LINES:
        tool = line.split()[0]
        assert f"`{tool}" in table or tool == "cd", tool


def test_the_pages_checksum_is_the_one_that_is_compared(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_text(name)
    (line,) = [one for one in _LINES if "sha256sum" in one]

    done = subprocess.run(
        ["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True
    )

    assert checksum.of_folder(model) == f"sha256:{done.stdout.split()[0]}"
