"""The safetensors files of a model directory: which tensors they hold, where, and that they are
whole. Reads headers only.

Format: https://huggingface.co/docs/safetensors: 8 bytes of header length, a JSON header with each
tensor's dtype, shape and data_offsets, then the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from infermesh.errors import ModelLoadFailed

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint."""

    file: Path
    dtype: str  # safetensors' name: "F32", "BF16", ...
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a model directory, by name."""

    files: Sequence[Path]
    tensors: Mapping[str, StoredTensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def find_files(directory: Path) -> list[Path]:
    """The weight files, from the index where there is one.

    Raises ModelLoadFailed where there is none, or one that the index names is missing.
    """
    index = directory / INDEX_NAME
    if index.is_file():
        files = [directory / name for name in sorted(set(_read_index(index).values()))]
        for file in files:
            if not file.is_file():
                raise ModelLoadFailed(f"{file} is missing; {INDEX_NAME} names it")
        return files
    if (directory / SINGLE_NAME).is_file():
        return [directory / SINGLE_NAME]
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise ModelLoadFailed(f"{directory} has {len(files)} safetensors files and no {INDEX_NAME}")
    raise ModelLoadFailed(f"{directory} has no safetensors file")


def read_checkpoint(directory: Path) -> Checkpoint:
    """Reads and checks all headers.

    Raises ModelLoadFailed naming the file that is torn, cut short or inconsistent.
    """
    files = find_files(directory)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors.update(_read_header(file))
    index = directory / INDEX_NAME
    if index.is_file():
        for name, file_name in _read_index(index).items():
            if name not in tensors or tensors[name].file.name != file_name:
                raise ModelLoadFailed(
                    f"{directory / file_name} has no tensor {name}; {INDEX_NAME} says so"
                )
    return Checkpoint(files, tensors)


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as exc:
        raise ModelLoadFailed(f"{index} is not a safetensors index") from exc


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 0 < header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
                raise ModelLoadFailed(f"{file} is not a safetensors file, or its header is torn")
            header = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(
                file,
                entry["dtype"],
                tuple(entry["shape"]),
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as exc:
        raise ModelLoadFailed(f"{file} has a torn safetensors header") from exc
    expected = 8 + header_bytes + end
    if size != expected:
        raise ModelLoadFailed(f"{file} has {size} bytes, its header wants {expected}: it is torn")
    return tensors
