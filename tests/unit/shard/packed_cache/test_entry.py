"""The file of a packed model: what is read is what was written, or it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from io import FileIO
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from services.shard.packed_cache.entry import Damaged, draft, read
from services.shard.surgery.stored import StoredModel

KEY = "k" * 40


def model() -> StoredModel:
    draw = torch.Generator().manual_seed(1)
    floats = torch.randn(7, 3, 5, generator=draw)
    tensors = {
        "a.packed.weights": floats.bfloat16(),
        "a.packed.bias": floats[0, 0].clone(),
        "b.packed.weights": torch.randint(-128, 127, (3, 11), generator=draw, dtype=torch.int8),
        "c.packed.weights": torch.randint(0, 255, (9,), generator=draw, dtype=torch.uint8),
        "norm.weight": torch.randn(1, generator=draw),
        "none": torch.empty(0, 4),
    }
    return StoredModel({"products": [{"sizes": [3, 4]}], "tables": []}, tensors)


def written(path: Path) -> Path:
    outline = draft(KEY, model())
    with FileIO(path, "w") as file:
        outline.write(file)
    assert path.stat().st_size == outline.num_bytes
    return path


def assert_equal(got: Mapping[str, torch.Tensor]) -> None:
    wanted = model().tensors
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert got[name].dtype is value.dtype
        assert torch.equal(got[name], value), name


def test_read_gives_what_was_written_at_whole_cache_lines(tmp_path: Path) -> None:
    found = read(written(tmp_path / "entry"), KEY)
    assert found is not None
    assert found.layout == model().layout
    assert_equal(found.tensors)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.tensors.values())


def test_tensors_lie_in_the_file_when_they_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "entry")
    found = read(path, KEY)
    assert found is not None
    spans = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    for name, tensor in found.tensors.items():
        address = tensor.data_ptr()
        assert not tensor.nbytes or any(start <= address < end for start, end in spans), name


def test_the_file_is_safetensors_for_others_when_they_read_it(tmp_path: Path) -> None:
    others = load_file(written(tmp_path / "entry"))
    assert_equal({name: others[name] for name in model().tensors})


def test_read_gives_none_when_there_is_no_file(tmp_path: Path) -> None:
    assert read(tmp_path / "entry", KEY) is None


def test_read_refuses_a_file_when_it_is_of_another_key(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match="header"):
        read(written(tmp_path / "entry"), "x" * 40)


def test_read_refuses_a_file_when_its_header_means_something_else(tmp_path: Path) -> None:
    path = written(tmp_path / "entry")
    content = path.read_bytes()
    for before, after in ((b"[3, 4]", b"[4, 3]"), (b"[7, 3, 5]", b"[3, 7, 5]")):
        assert content.count(before) == 1
        path.write_bytes(content.replace(before, after))
        with pytest.raises(Damaged, match="header"):
            read(path, KEY)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_read_refuses_a_file_when_any_of_its_bytes_changed(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = written(tmp_path / "entry")
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = read(path, KEY)
    except Damaged:
        return
    # between tensors there is nothing to damage
    assert found is not None
    assert found.layout == model().layout
    assert_equal(found.tensors)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_read_refuses_a_file_when_it_is_cut_short_or_its_end_was_never_written(
    tmp_path: Path, data: st.DataObject
) -> None:
    whole = written(tmp_path / "entry").read_bytes()
    length = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path / "torn"
    path.write_bytes(whole[:length])
    with pytest.raises(Damaged):
        read(path, KEY)
    length = min(length, whole.rindex(bytes(model().tensors["norm.weight"].numpy().data)))
    path.write_bytes(whole[:length] + bytes(len(whole) - length))
    with pytest.raises(Damaged):
        read(path, KEY)
