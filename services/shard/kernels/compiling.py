"""Makes the kernel library from its sources, once per machine, sources and flags.

Any number of processes may ask at once: one compiles, the others wait for it. No torch.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from services.shard import host

SOURCES = Path(__file__).parent / "cpp"
# What a processor must have, by the name that torch gives its vector instructions.
_ARCHITECTURES = {"AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}
# What some processors of an architecture have beyond it, by the name that Linux gives it.
_EXTENSIONS = {
    "x86-64-v3": {"avx_vnni": "-mavxvnni"},
    "x86-64-v4": {"avx512_vnni": "-mavx512vnni", "avx512_bf16": "-mavx512bf16"},
}
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wall")
_COMPILERS = ("g++", "clang++", "c++")
_TIMEOUT_S = 300.0


class CannotCompile(Exception):
    """Why there are no kernels; one sentence."""


def prepare(
    capability: str,
    folder: Path,
    on_compile: Callable[[], None],
    extra_flags: tuple[str, ...] = (),
    features: frozenset[str] | None = None,
) -> Path:
    """The library for this processor; made now, if nobody has made it before.

    Args:
        capability: what `torch.backends.cpu.get_cpu_capability()` says.
        folder: where libraries are kept.
        on_compile: called before anything is compiled; it takes some seconds.
        extra_flags: for the compiler as for the linker.
        features: of another processor, as Linux names them; None: this one's.

    Raises:
        CannotCompile: no kernels for this processor, no compiler, or it fails.
    """
    architecture = _ARCHITECTURES.get(capability)
    if architecture is None or platform.machine() not in ("x86_64", "AMD64"):
        raise CannotCompile(f"there are none for this processor ({capability.lower()})")
    extensions = _EXTENSIONS.get(architecture, {})
    has = host.processor_features() if features is None else features
    found = [flag for feature, flag in extensions.items() if feature in has]
    flags = (*_FLAGS, f"-march={architecture}", *found, *extra_flags)
    library = folder / f"{_name(flags)}-{architecture}.so"
    if library.is_file():
        return library
    compiler = find_compiler()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(library):
            if not library.is_file():
                on_compile()
                _build(compiler, flags, extra_flags, library)
    except OSError as exc:
        raise CannotCompile(f"{folder} can't be written: {exc.strerror or exc}") from exc
    return library


def find_compiler() -> str:
    """The C++ compiler: `CXX` of the environment, or the first that is installed.

    Raises:
        CannotCompile: there is none.
    """
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else _COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise CannotCompile(f"there is no {wanted or 'C++ compiler'} here (install g++)")


def _name(flags: tuple[str, ...]) -> str:
    """Changes with whatever changes the library."""
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


@contextmanager
def _alone(library: Path) -> Iterator[None]:
    """Among all processes; a lock of a process that died is free."""
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(
    compiler: str, flags: tuple[str, ...], extra_flags: tuple[str, ...], library: Path
) -> None:
    """Compiles all sources side by side, and puts the library into place whole."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        # Compiled for OpenMP, and linked without: its calls go to the OpenMP that torch brought
        # into the process, so that both share one pool of threads.
        commands = [
            [compiler, *flags, "-fopenmp", "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        linked = Path(scratch) / "linked.so"
        _run([compiler, "-shared", *extra_flags, "-o", str(linked), *map(str, objects)])
        linked.replace(library)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise CannotCompile(f"{command[0]} took more than {_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        why = next((line for line in lines if "error" in line), lines[0])
        raise CannotCompile(f"{command[0]} failed: {why}")
