"""The steps of deploy/Dockerfile, executed in clean folders, make images that hold what the
services need, and no more.
"""

import subprocess
from pathlib import Path

import pytest

from services.shard.kernels import prebuild
from tests.deploy.dockerfile import Build, Stage, run_environment, size_bytes

_MAX_CONTROL_BYTES = 400 * 10**6


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Build(tmp_path_factory.mktemp("control")).target("control")


def python(stage: Stage, code: str) -> subprocess.CompletedProcess[str]:
    """Runs in a finished image: its own packages, its own code, nothing of the checkout."""
    return subprocess.run(
        ["python", "-c", code],
        cwd=stage.place(stage.workdir),
        env=run_environment(stage, Path("/nowhere")),
        capture_output=True,
        text=True,
        check=False,
    )


def modules(*names: str) -> str:
    return f"import importlib; [importlib.import_module(name) for name in {names!r}]"


@pytest.mark.slow
def test_control_image_has_its_services_and_the_command_line(control: Stage) -> None:
    done = python(
        control,
        modules(
            *("gateway.__main__", "gateway.server", "services.auth.__main__"),
            *("services.auth.migrate", "services.scheduler.__main__", "infermesh.cli"),
        ),
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert control.user == "65532:65532"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "transformers", "pip", "services.shard", "pytest"])
def test_control_image_has_no_more(control: Stage, name: str) -> None:
    done = python(control, modules(name))

    assert "ModuleNotFoundError" in done.stderr


@pytest.mark.slow
def test_control_image_is_small(control: Stage) -> None:
    assert size_bytes(control.root) <= _MAX_CONTROL_BYTES


# on any of these processors, and on this one
_FINDS_ITS_KERNELS = """
from pathlib import Path
import torch
from services.shard.kernels.compiling import prepare
from services.shard.kernels.prebuild import PROCESSORS
def no_compiler(): raise SystemExit("something was to be compiled")
for capability, features in (*PROCESSORS, (torch.backends.cpu.get_cpu_capability(), None)):
    prepare(capability, Path("{folder}"), no_compiler, features=features)
"""


@pytest.fixture(scope="module")
def compute_build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Build, Stage]:
    # an index of PyPI's kind: torch's own may be out of reach, and its wheel at hand
    arguments = {"TORCH_INDEX": "https://pypi.org/simple"}
    build = Build(tmp_path_factory.mktemp("compute"), arguments)
    return build, build.target("compute")


@pytest.mark.slow
def test_compute_image_has_its_services_and_kernels(compute_build: tuple[Build, Stage]) -> None:
    build, compute = compute_build
    done = python(
        compute,
        modules(
            *("services.shard.__main__", "services.shard.torch_engine", "services.cache.__main__"),
            *("services.cache.minilm", "services.shard.fetch.__main__", "boto3"),
            *("torch", "transformers"),
        ),
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert python(compute, "import torch; print(torch.__version__)").stdout == "2.13.0+cpu\n"
    folder = compute.place("/opt/infermesh/kernels")
    assert len(list(folder.glob("*.so"))) == len(prebuild.PROCESSORS)
    assert python(compute, _FINDS_ITS_KERNELS.format(folder=folder)).stderr == ""
    assert compute.place("/app/demo/model/config.json").is_file()
    assert "ModuleNotFoundError" in python(compute, modules("gateway")).stderr
    assert len(build.skipped) == 1  # the compiler
