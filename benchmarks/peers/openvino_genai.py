"""OpenVINO GenAI: exported by optimum-cli, asked in process, because its wheel has no server."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from benchmarks.local_mesh import ROOT
from benchmarks.peers.driven_process import driven
from benchmarks.peers.environment import HOME, made_once, run, virtual_environment
from benchmarks.peers.model import model_directory
from benchmarks.peers.peer import Peer, Running

PINS = ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0")
# Not used, and its builds for other torch releases break the export.
UNWANTED = ("torchvision",)
WEIGHTS = {"bf16": "fp16", "int8": "int8", "int4": "int4"}  # as optimum-cli names them


def set_up(precision: str) -> None:
    """Its environment, and the model in its own format."""
    virtual_environment("openvino-genai", PINS, UNWANTED)
    model = model_directory()

    def export(folder: Path) -> None:
        command = HOME / "openvino-genai" / "bin" / "optimum-cli"
        task = ("--task", "text-generation-with-past")
        weights = ("--weight-format", WEIGHTS[precision])
        run(str(command), "export", "openvino", "-m", str(model), *task, *weights, str(folder))

    made_once(_folder(precision), f"{PINS} {WEIGHTS[precision]}", export)


@contextlib.contextmanager
def running(precision: str) -> Iterator[Running]:
    """The loop of `drivers.openvino_loop`; its settings are there."""
    python = HOME / "openvino-genai" / "bin" / "python"
    loop = ("-m", "benchmarks.peers.drivers.openvino_loop")
    with driven((str(python), *loop, str(_folder(precision))), ROOT) as process:
        yield process


def _folder(precision: str) -> Path:
    return HOME / "converted" / f"openvino-{precision}"


PEER = Peer("openvino-genai", tuple(WEIGHTS), set_up, running)
