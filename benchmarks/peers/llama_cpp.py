"""llama.cpp, by its own server: built here from the sources that llama-cpp-python carries."""

import contextlib
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.load import Target
from benchmarks.local_mesh import ROOT
from benchmarks.peers.environment import HOME, made_once, run, virtual_environment
from benchmarks.peers.model import model_directory
from benchmarks.peers.peer import SHORT_SPIN, HttpServer, Peer, Running
from benchmarks.peers.server_process import free_port, serving

PIN = "llama-cpp-python==0.3.36"
BUILD = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_UI=OFF",
)
# None: the converter's own bfloat16.
WEIGHTS = {"bf16": None, "int8": "Q8_0", "int4": "Q4_0"}
# For two cores: as many slots as streams, and nothing kept for later.
FLAGS = (
    *("--threads", "2", "--threads-batch", "2", "--flash-attn", "on"),
    *("--parallel", "32", "--ctx-size", "8192", "--threads-http", "48"),
    *("--no-cache-prompt", "--cache-ram", "0", "--no-ui"),
)
# Greedy by one pass over the logits; the default chain sorts first.
SAMPLING = {"samplers": ["temperature"]}


def set_up(precision: str) -> None:
    """Builds it, and converts the weights."""
    made_once(_home(), " ".join((PIN, *BUILD)), _build)
    _weights(precision)


@contextlib.contextmanager
def running(precision: str) -> Iterator[Running]:
    """`llama-server`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = str(_program("llama-server"))
    address = ("--host", "127.0.0.1", "--port", str(port))
    command = (server, "--model", str(_weights(precision)), *FLAGS, *address)
    with serving(command, f"{url}/health", timeout_s=120, env=SHORT_SPIN):
        target = Target(url, "bench", full_length=("ignore_eos",), extra=SAMPLING)
        yield HttpServer(
            target, {"pin": PIN, "build": BUILD, "flags": FLAGS, "environment": SHORT_SPIN}
        )


def _home() -> Path:
    return HOME / "llama.cpp"


def _program(name: str) -> Path:
    return _home() / "build" / "bin" / name


def _build(folder: Path) -> None:
    """One compiler at a time: a set-up shall not be felt."""
    python = virtual_environment("llama.cpp-download", ("pip",))
    options = ("--no-deps", "--no-binary", ":all:", "--dest", str(folder))
    run(str(python), "-m", "pip", "download", "--quiet", *options, PIN)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        sources.extractall(folder, filter="data")
    archive.unlink()
    (unpacked,) = folder.iterdir()
    unpacked.rename(folder / "sources")
    tree, build = folder / "sources" / "vendor" / "llama.cpp", folder / "build"
    run("cmake", "-S", str(tree), "-B", str(build), *BUILD)
    programs = ("--target", "llama-server", "llama-quantize")
    run("cmake", "--build", str(build), "--parallel", "1", *programs)


def _weights(precision: str) -> Path:
    if (kind := WEIGHTS[precision]) is None:
        return made_once(HOME / "converted" / "llama.cpp-bf16", PIN, _convert) / "model.gguf"

    def quantize(folder: Path) -> None:
        source, target = str(_weights("bf16")), str(folder / "model.gguf")
        run(str(_program("llama-quantize")), source, target, kind, "1")

    folder = HOME / "converted" / f"llama.cpp-{precision}"
    return made_once(folder, f"{PIN} {kind}", quantize) / "model.gguf"


def _convert(folder: Path) -> None:
    module = ("-m", "benchmarks.peers.drivers.convert_to_gguf")
    sources = str(_home() / "sources" / "vendor" / "llama.cpp")
    target = str(folder / "model.gguf")
    run(sys.executable, *module, sources, str(model_directory()), target, cwd=ROOT)


PEER = Peer("llama.cpp", tuple(WEIGHTS), set_up, running)
