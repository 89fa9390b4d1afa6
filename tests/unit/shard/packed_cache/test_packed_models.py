"""Models whose packed weights are found on disk compute, bit for bit, what they compute else; and
whatever happens to the files, a model is served."""

from __future__ import annotations

import errno
import logging
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from infermesh.config import ShardConfig
from services.shard.domain import LoadSpec
from services.shard.engine import LoadedModel
from services.shard.loading import load_model
from services.shard.packed_cache.cache import _lookups
from services.shard.surgery.operation import _modules
from services.shard.surgery.stored import describe
from tests.architectures import ARCHITECTURES
from tests.compiled_kernels import needs_kernels
from tests.tiny_models import VOCAB_SIZE, write_tiny_model
from tests.unit.shard.quantized_models import BLOCK, mixed_logits, wide_fields

pytestmark = needs_kernels
FOUND = ("hit", "miss", "damaged")


def load(directory: Path, folder: Path, gib: float = 1.0, **fields: Any) -> LoadedModel:
    chosen = {"block_size": BLOCK, "num_blocks": 120, "max_num_seqs": 8, **fields}
    config = ShardConfig(
        device="cpu", num_threads=1, packed_cache_gib=gib, packed_cache_dir=str(folder)
    )
    return load_model(LoadSpec(str(directory), **chosen), config, lambda progress: None)


def lookups() -> Counter[str]:
    return Counter({found: int(_lookups.labels(found)._value.get()) for found in FOUND})  # type: ignore[attr-defined]


def found_by(directory: Path, folder: Path, **fields: Any) -> tuple[LoadedModel, Counter[str]]:
    """The model, and what was found when it was looked for."""
    before = lookups()
    loaded = load(directory, folder, **fields)
    return loaded, lookups() - before


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def logits(loaded: LoadedModel) -> dict[tuple[int, int], torch.Tensor]:
    rng = random.Random(1)
    sequences = [[rng.randrange(VOCAB_SIZE) for _ in range(size)] for size in (3, 17, 30)]
    return mixed_logits(loaded, sequences, rng)


def assert_same(one: LoadedModel, other: LoadedModel) -> None:
    wanted, got = logits(one), logits(other)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(got[place], value) for place, value in wanted.items())
    for name in ("model_fingerprint", "num_parameters", "weight_bytes", "dtype", "quantization"):
        assert getattr(one.manifest, name) == getattr(other.manifest, name), name


def kernel_modules() -> dict[str, float]:
    kinds = ("products", "merged", "norms", "mlps", "attentions", "layers", "stacked", "shortcut")
    return {kind: _modules.labels(kind)._value.get() for kind in kinds}  # type: ignore[attr-defined]


@pytest.mark.parametrize("served", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_model_computes_the_same_when_it_was_packed_before(
    model_type: str, served: str, tmp_path: Path
) -> None:
    directory = write_tiny_model(tmp_path / "model", model_type, **wide_fields(model_type))
    fields = {"quantize": served} if served.startswith("int") else {"dtype": served}
    plain, found = found_by(directory, tmp_path / "packed", gib=0, **fields)
    assert not found
    assert not (tmp_path / "packed").exists()
    modules = kernel_modules()
    for wanted in ("miss", "hit"):
        loaded, found = found_by(directory, tmp_path / "packed", **fields)
        assert found == Counter([wanted])
        assert kernel_modules() == modules
        assert_same(plain, loaded)
    assert len(entries(tmp_path / "packed")) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_tables_are_kept_as_they_are(tied: bool, tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model", "llama", tie_word_embeddings=tied)
    for dtype in ("float32", "bfloat16"):
        cold, warm = (load(directory, tmp_path / "packed", dtype=dtype) for _ in range(2))
        assert_same(cold, warm)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", "qwen2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "packed"


def test_the_checkpoint_is_not_read_when_the_model_was_packed_before(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = model / "model.safetensors"
    os.utime(file, ns=(1, 1))
    # as long after its last change as a file must be for its hash to be remembered
    monkeypatch.setattr("services.shard.packed_cache.hashes._SETTLED_NS", -1)
    cold = load(model, folder)

    def refuse(*_: object) -> None:
        raise AssertionError("the checkpoint is read")

    monkeypatch.setattr("services.shard.fingerprint.file_sha256", refuse)
    monkeypatch.setattr("services.shard.weights.read_tensors", refuse)
    warm, found = found_by(model, folder)
    assert found == Counter(["hit"])
    assert_same(cold, warm)


def test_a_damaged_file_is_packed_anew(model: Path, folder: Path) -> None:
    cold = load(model, folder)
    entry = entries(folder)[0]
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = folder.parent / "damaged"
    damaged.write_bytes(content)
    damaged.replace(entry)  # the first model still reads the file that was there
    rebuilt, found = found_by(model, folder)
    assert found["damaged"] == found["miss"] == 1
    assert_same(cold, rebuilt)
    assert found_by(model, folder)[1] == Counter(["hit"])


def test_models_are_told_apart(model: Path, folder: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", "qwen2", seed=1)
    asked: list[tuple[Path, dict[str, Any]]] = [
        (model, {}),
        (other, {}),
        (model, {"dtype": "bfloat16"}),
        (model, {"quantize": "int8"}),
    ]
    for wanted in ("miss", "hit"):
        for directory, fields in asked:
            assert found_by(directory, folder, **fields)[1] == Counter([wanted])
    assert len(entries(folder)) == len(asked)


def test_what_is_used_stays_when_another_model_takes_its_place(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    loaded = load(model, folder)
    before = logits(loaded)
    size = entries(folder)[0].stat().st_size
    other = write_tiny_model(tmp_path / "other", "qwen2", seed=1)
    load(other, folder, gib=1.5 * size / (1 << 30))
    assert len(entries(folder)) == 1
    after = logits(loaded)
    assert all(torch.equal(after[place], value) for place, value in before.items())
    assert found_by(model, folder)[1] == Counter(["miss"])


def warnings_of(records: list[logging.LogRecord]) -> list[str]:
    return [record.getMessage() for record in records if record.levelno >= logging.WARNING]


def no_room(fd: int, offset: int, length: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("trouble", ["full", "no folder", "too small"])
def test_a_model_is_served_from_its_own_memory_when_nothing_can_be_kept(
    trouble: str,
    model: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = load(model, folder, gib=0)
    gib = 1e-6 if trouble == "too small" else 1.0
    if trouble == "full":
        monkeypatch.setattr(os, "posix_fallocate", no_room)
    if trouble == "no folder":
        folder.write_bytes(b"")
    caplog.clear()
    loaded, found = found_by(model, folder, gib=gib)
    assert found == Counter(["miss"])
    assert_same(plain, loaded)
    assert warnings_of(caplog.records) == ["packed weights are not kept"] * (trouble != "too small")
    assert trouble == "no folder" or not list(folder.glob("*.[sp]a*"))


def test_nothing_is_kept_when_the_checkpoint_was_replaced_while_it_was_read(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_tiny_model(tmp_path / "other", "qwen2", seed=1) / "model.safetensors"
    from services.shard import torch_loading

    plainly = torch_loading.load_weights

    def late(*arguments: Any) -> None:
        other.replace(model / "model.safetensors")
        plainly(*arguments)

    monkeypatch.setattr(torch_loading, "load_weights", late)
    load(model, folder)
    assert not entries(folder)


def test_dummy_weights_are_not_kept(model: Path, folder: Path) -> None:
    assert not found_by(model, folder, load_format="dummy")[1]
    assert not entries(folder)


def test_all_weights_lie_in_the_file_after_a_miss_and_after_a_hit(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    from services.shard import torch_loading

    fuse = torch_loading.fuse

    def watched(packed: Any, kernels: Any) -> None:
        seen.append(describe(packed))
        fuse(packed, kernels)

    monkeypatch.setattr(torch_loading, "fuse", watched)
    for _ in range(2):
        loaded = load(model, folder)
        spans = [
            [int(end, 16) for end in line.split()[0].split("-")]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(str(entries(folder)[0]))
        ]
        for name, tensor in seen.pop().tensors.items():
            address = tensor.data_ptr()
            assert any(start <= address < end for start, end in spans), name
        del loaded


def test_mapped_weights_are_not_taken_for_free_memory(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.shard import torch_loading

    told: list[int] = []

    def available(mapped_bytes: int = 0) -> int:
        told.append(mapped_bytes)
        return 1 << 30

    monkeypatch.setattr(torch_loading, "available_memory_bytes", available)
    for gib, is_mapped in ((0.0, False), (1.0, True), (1.0, True)):
        loaded = load(model, folder, gib=gib)
        assert told[-1] == is_mapped * loaded.manifest.weight_bytes
