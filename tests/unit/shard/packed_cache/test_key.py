"""Packed weights are found under their key alone: it has to change with all that shapes them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from services.shard.packed_cache import key as module
from services.shard.packed_cache.key import PackedKey, sources_digest

KEY = PackedKey([("a.safetensors", "0" * 64)], "c0", "bfloat16", "int8", "abc-x86-64-v3")
CHANGES: dict[str, Any] = {
    "weights": [("a.safetensors", "1" * 64)],
    "config": "c1",
    "dtype": "float32",
    "quantization": "int4-g32",
    "kernels": "abc-x86-64-v4",
    "sources": "s1",
    "libraries": {"torch": "0", "transformers": "0"},
}


def test_key_is_the_same_when_nothing_differs() -> None:
    assert str(dataclasses.replace(KEY)) == str(KEY)


def test_every_field_is_changed_below() -> None:
    assert CHANGES.keys() == {field.name for field in dataclasses.fields(PackedKey)}


@pytest.mark.parametrize("name", CHANGES)
def test_key_differs_when_a_field_does(name: str) -> None:
    assert str(dataclasses.replace(KEY, **{name: CHANGES[name]})) != str(KEY)


def test_key_differs_when_a_file_has_another_name_or_there_is_one_more() -> None:
    (name, sha256), *_ = KEY.weights
    for weights in ([("b.safetensors", sha256)], [(name, sha256)] * 2):
        assert str(dataclasses.replace(KEY, weights=weights)) != str(KEY)


def test_sources_digest_differs_when_any_module_of_the_shard_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = Path(module.__file__).parents[1]
    copy = tmp_path / "shard"
    shutil.copytree(shard, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "_SHARD", copy)
    compute = sources_digest.__wrapped__
    assert compute() == sources_digest()
    seen = {compute()}
    for name in ("row_codes.py", "kernels/panels.py", "surgery/stored.py"):
        with (copy / name).open("a") as source:
            source.write("\n")
        seen.add(compute())
    assert len(seen) == 4
