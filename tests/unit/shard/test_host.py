"""What memory is left on machines as their kernels describe them."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.shard import host
from services.shard.host import available_memory_bytes

MACHINE = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 4000 kB\n"}
GROUP = {"/sys/fs/cgroup/memory.max": "3072000", "/sys/fs/cgroup/memory.current": "1024000"}


@pytest.mark.parametrize(
    ("files", "mapped_kib", "left_kib"),
    [
        (MACHINE, 0, 4000),
        (MACHINE, 1500, 2500),
        (MACHINE, 5000, 0),
        # the group counts the mapped file among what it uses
        ({**MACHINE, **GROUP}, 1500, 2000),
        ({**MACHINE, **GROUP}, 3000, 1000),
    ],
)
def test_mapped_files_are_not_available_when_they_are_to_stay(
    files: dict[str, str], mapped_kib: int, left_kib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> str:
        return files.get(str(path), "")

    monkeypatch.setattr(host, "_read", read)
    assert available_memory_bytes(mapped_kib * 1024) == left_kib * 1024
