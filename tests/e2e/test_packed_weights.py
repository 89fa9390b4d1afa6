"""Packed weights kept on disk, behind HTTP: a restart maps them, two replicas share them, and a
damaged file costs time alone."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.compiled_kernels import needs_kernels
from tests.e2e.few_questions import answers
from tests.e2e.mesh_process import Mesh

pytestmark = needs_kernels
OPTIONS = ("--no-cache", "--quantize", "int8")


def found(mesh: Mesh, *shards: str) -> dict[str, float]:
    """What shards found on disk when they loaded the model, all together."""
    counts: dict[str, float] = {}
    for shard in shards:
        for outcome in ("hit", "miss", "damaged"):
            try:
                count = mesh.metric(shard, "packed_cache_lookups_total", found=outcome)
            except AssertionError:  # it has not happened there
                continue
            counts[outcome] = counts.get(outcome, 0) + count
    return counts


def maps(mesh: Mesh, shard: str, file: Path) -> bool:
    memory = Path(f"/proc/{mesh.service(shard)['pid']}/maps").read_text()
    return any(line.endswith(str(file)) for line in memory.splitlines())


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.chmod(0o600)
    file.write_bytes(content)


@pytest.mark.slow
def test_packed_weights_outlive_their_shard_and_are_shared_and_never_served_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "packed"
    for name in ("off", "one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("INFERMESH_SHARD__PACKED_CACHE_DIR", str(folder))
    monkeypatch.setenv("INFERMESH_SHARD__PACKED_CACHE_GIB", "0")
    with Mesh(tmp_path / "off", *OPTIONS) as mesh:
        wanted = answers(mesh)
        weight_bytes = mesh.metric("shard-0", "shard_weight_bytes")
        assert not found(mesh, "shard-0")
        assert not folder.exists()
    monkeypatch.setenv("INFERMESH_SHARD__PACKED_CACHE_GIB", "1")
    with Mesh(tmp_path / "one", *OPTIONS) as mesh:
        assert found(mesh, "shard-0") == {"miss": 1}
        assert answers(mesh) == wanted
        (file,) = folder.glob("*.safetensors")
        assert maps(mesh, "shard-0", file)
        mesh.wait_restarted("shard-0", mesh.kill("shard-0", signal.SIGKILL))
        assert answers(mesh) == wanted
        assert found(mesh, "shard-0") == {"hit": 1}
        assert mesh.metric("shard-0", "shard_weight_bytes") == weight_bytes
        assert maps(mesh, "shard-0", file)
    flip_a_byte(file)
    with Mesh(tmp_path / "two", *OPTIONS, "--replicas", "2") as mesh:
        shards = ("shard-0", "shard-1")
        assert found(mesh, *shards) == {"damaged": 1, "miss": 1, "hit": 1}
        assert all(maps(mesh, shard, file) for shard in shards)
        assert answers(mesh) == wanted
    assert list(folder.glob("*.safetensors")) == [file]
