"""The C++ kernels behind HTTP: the model runs on them, and gives the tokens that torch gives."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compiled_kernels import needs_kernels
from tests.e2e.few_questions import QUESTIONS, answers
from tests.e2e.mesh_process import Mesh

pytestmark = needs_kernels
OPTIONS = ("--no-cache", "--dtype", "float32")


def num_modules(mesh: Mesh, kind: str) -> float:
    return mesh.metric("shard-0", "shard_kernel_modules", kind=kind)


def test_a_mesh_runs_on_kernels_or_without_and_answers_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("on", "off"):
        (tmp_path / name).mkdir()
    with Mesh(tmp_path / "on", *OPTIONS) as mesh:
        num_layers = num_modules(mesh, "layers")
        assert num_layers > 0
        assert num_modules(mesh, "attentions") == num_modules(mesh, "mlps") == num_layers
        assert num_modules(mesh, "norms") == 2 * num_layers + 1
        assert num_modules(mesh, "merged") == 2 * num_layers
        assert num_modules(mesh, "products") == 4 * num_layers + 1
        assert num_modules(mesh, "stacked") == num_layers
        assert num_modules(mesh, "shortcut") == 1
        fast = answers(mesh)
        computed = mesh.metric("scheduler-0", "prompt_tokens_computed_total")
        unneeded = mesh.metric("shard-0", "shard_unneeded_states_total")
        assert unneeded == computed - len(QUESTIONS) > 0  # all but each prompt's last
    monkeypatch.setenv("INFERMESH_SHARD__KERNELS", "off")
    with Mesh(tmp_path / "off", *OPTIONS) as mesh:
        with pytest.raises(AssertionError, match="exports no"):
            num_modules(mesh, "products")
        assert answers(mesh) == fast


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Each wants a core every millisecond, as the services of a mesh do. For a minute at most."""
    work = """if True:
        import time
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.001)  # waits for nothing: who wakes up takes a core from another
            for _ in range(20_000): pass
    """
    running = [subprocess.Popen([sys.executable, "-c", work]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def num_helped(mesh: Mesh) -> float:
    return mesh.metric("shard-0", "shard_kernel_helped_parts_total")


def test_threads_help_one_that_lost_its_core_and_the_answers_stay_the_same(tmp_path: Path) -> None:
    for threads in ("1", "2"):
        (tmp_path / threads).mkdir()
    flags = (*OPTIONS, "--set")
    with Mesh(tmp_path / "1", *flags, "shard.num_threads=1") as mesh:
        alone = answers(mesh)
        assert num_helped(mesh) == 0
    busy = busy_processes(os.cpu_count() or 2)
    with Mesh(tmp_path / "2", *flags, "shard.num_threads=2") as mesh, busy:
        for _ in range(20):
            assert answers(mesh) == alone
            if num_helped(mesh) > 0:
                return
    pytest.fail("no thread was ever late, or nobody helped")
