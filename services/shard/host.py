"""What this machine gives to this process: cores and memory."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

_CPU = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")
_BYTES_PER_THREAD = 32 << 20
_SPINS = "500"


def physical_cores() -> int:
    """Physical cores that this process may run on, within its CPU quota; at least 1.

    Hyperthreads of one core share its vector units: a second thread there only costs.
    """
    allowed = os.sched_getaffinity(0)
    cores = set()
    for cpu in allowed:
        siblings = _read(_CPU / f"cpu{cpu}" / "topology" / "thread_siblings_list")
        cores.add(siblings or str(cpu))
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    limit = len(cores)
    if quota.isdigit() and period.isdigit():
        limit = min(limit, -(-int(quota) // int(period)))
    return max(1, limit)


def available_memory_bytes(mapped_bytes: int = 0) -> int:
    """Memory that can still be taken without swapping, within this process's cgroup.

    Args:
        mapped_bytes: of files in the page cache that are to stay there; the machine calls them
            available, while a cgroup counts them as used.
    """
    available = 0
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            available = max(0, int(line.split()[1]) * 1024 - mapped_bytes)
    limit, used = _read(_CGROUP / "memory.max"), _read(_CGROUP / "memory.current")
    if limit.isdigit() and used.isdigit():
        available = min(available, max(0, int(limit) - int(used)))
    return available


def processor_name() -> str:
    """As the kernel has it; the architecture where it has none."""
    return _of_first_processor("model name") or platform.machine()


def processor_features() -> frozenset[str]:
    """Instruction sets by the kernel's names, such as avx512_vnni; none where it has no list."""
    return frozenset(_of_first_processor("flags").split())


def prepare_process() -> None:
    """Settings of the C libraries beneath torch; to be called before torch is imported."""
    # Threads that spin at OpenMP's barriers for long make a step 40 times slower once another
    # process wants a core; gateway and scheduler do. Some microseconds are enough for the next of
    # the many short regions of a token: a thread that sleeps has to be woken for each.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    _keep_freed_memory()


def num_threads(weight_bytes: int, local_shards: int = 1) -> int:
    """Threads for a model of this size on its part of the cores: splitting a small product costs
    more than it saves."""
    cores = physical_cores() // local_shards
    return max(1, min(cores, weight_bytes // _BYTES_PER_THREAD))


def _of_first_processor(name: str) -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


def _keep_freed_memory() -> None:
    """Tells glibc to keep what is freed instead of returning it to the system.

    Else each large temporary of a step is mapped and faulted in anew, which costs several times
    its arithmetic. Before threads have arenas of their own, whose chunks are limited. Does nothing
    on another C library.
    """
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_arena_max, 1)


def release_freed_memory() -> None:
    """Returns what is freed to the system once, in spite of `prepare_process`: after a load, what
    only the load needed. Does nothing on another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Releaser:
    """Returns freed memory now and then while much is allocated to stay and more to go: else what
    stays lies between holes, and the heap grows as large as all of it together."""

    def __init__(self, every_bytes: int = 32 << 20) -> None:
        self._every_bytes = every_bytes
        self._since_bytes = 0

    def freed(self, num_bytes: int) -> None:
        """So much was freed, or was temporary."""
        self._since_bytes += num_bytes
        if self._since_bytes >= self._every_bytes:
            self._since_bytes = 0
            release_freed_memory()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
