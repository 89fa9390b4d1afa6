"""What can be seen of the images without building them."""

import re
import shlex
import tomllib

import pytest
import yaml

from deploy import make_locks
from tests.deploy import chart
from tests.deploy.dockerfile import ROOT, instructions

_STEPS = list(instructions((ROOT / "deploy" / "Dockerfile").read_text()))
_PINS = dict(
    line.lower().split("==")
    for line in (ROOT / "deploy" / "constraints.txt").read_text().split()
    if "==" in line
)


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=]", one)[0].lower() for one in requirements}


@pytest.mark.parametrize("name", ["control.txt", "compute-cpu.txt", "compute-cuda.txt"])
def test_every_package_is_pinned_by_version_and_hash(name: str) -> None:
    entries = make_locks.parse((make_locks.FOLDER / name).read_text())

    assert len(entries) > 15
    for package, entry in entries.items():
        first, *hashes = entry.split()
        version = first.partition("==")[2]
        assert re.fullmatch(r"[\w.+]+", version), package
        assert any(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), package
        known = _PINS.get(package) or _PINS.get(package.replace("-", "_"))
        if known is None:  # CUDA's, which the constraints leave to torch
            assert name == "compute-cuda.txt" or package == "setuptools", package
        else:
            assert version == known, package


def test_locks_hold_what_the_extras_ask_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    files = {
        name: set(make_locks.parse((make_locks.FOLDER / name).read_text()))
        for name in ("control.txt", "compute-cpu.txt", "compute-cuda.txt")
    }

    assert names_of(project["dependencies"] + extras["control"]) <= files["control.txt"]
    cuda = files["control.txt"] | files["compute-cuda.txt"]
    assert names_of(extras["compute"]) <= cuda
    cpu = files["control.txt"] | files["compute-cpu.txt"] | {"torch"}
    assert names_of(extras["compute"]) <= cpu
    assert not {"torch", "transformers"} & files["control.txt"]


def test_images_run_as_the_user_of_the_chart_and_write_nothing_beside_tmp() -> None:
    users = [rest for word, rest in _STEPS if word == "USER"]
    pod = dict(chart.pods(chart.manifests()))["Deployment/infermesh-gateway"]
    context = pod["spec"]["securityContext"]

    assert users == [f"{context['runAsUser']}:{context['runAsGroup']}"] * 2
    environment = " ".join(rest for word, rest in _STEPS if word == "ENV")
    assert "HOME=/tmp" in environment


def test_images_say_what_they_are() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    labels = [rest for word, rest in _STEPS if word == "LABEL"]

    assert len(labels) == 2
    for name, text in zip(("control", "compute"), labels, strict=True):
        found = dict(part.split("=", 1) for part in shlex.split(text))
        own = {key.removeprefix("org.opencontainers.image."): one for key, one in found.items()}
        assert own["title"] == f"infermesh {name}"
        assert own["version"] == project["version"]
        assert own["licenses"] == project["license"]
        assert own["revision"] == "${REVISION}"
    assert [rest for word, rest in _STEPS if word == "HEALTHCHECK"] == ["NONE", "NONE"]


def test_compute_image_has_what_the_charts_init_container_runs() -> None:
    copied = [rest.split()[0] for word, rest in _STEPS if word == "COPY"]
    entries = make_locks.parse((make_locks.FOLDER / "compute-cpu.txt").read_text())

    assert "services/shard" in copied
    assert {"boto3", "botocore", "huggingface-hub"} <= set(entries) | set(
        make_locks.parse((make_locks.FOLDER / "control.txt").read_text())
    )


def test_images_are_of_the_torch_that_the_constraints_name() -> None:
    (step,) = [rest for word, rest in _STEPS if word == "RUN" and "torch==" in rest]

    assert f"torch=={_PINS['torch']}+cpu" in step


def test_chart_and_project_have_one_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    meta = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())

    assert meta["appVersion"] == version
