"""The C++ kernels behind HTTP: the model runs on them, and gives the tokens that torch gives."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compiled_kernels import needs_kernels
from tests.e2e.few_questions import answers
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
    monkeypatch.setenv("INFERMESH_SHARD__KERNELS", "off")
    with Mesh(tmp_path / "off", *OPTIONS) as mesh:
        with pytest.raises(AssertionError, match="exports no"):
            num_modules(mesh, "products")
        assert answers(mesh) == fast


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Each wants a core now and then, as the services of a mesh do, for a minute at most."""
    work = """if True:
        import time
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.001)
            for _ in range(20_000): pass
    """
    running = [subprocess.Popen([sys.executable, "-c", work]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_threads_help_one_that_lost_its_core_and_the_answers_stay_the_same(tmp_path: Path) -> None:
    given, helped = [], []
    for threads in (1, 2):
        (tmp_path / str(threads)).mkdir()
        flags = (*OPTIONS, "--set", f"shard.num_threads={threads}")
        with Mesh(tmp_path / str(threads), *flags) as mesh, busy_processes(2):
            given.append(answers(mesh))
            helped.append(mesh.metric("shard-0", "shard_kernel_helped_parts_total"))
    assert given[0] == given[1]
    assert helped[0] == 0
    assert helped[1] > 0
