"""The file of one packed model: safetensors, whose tensors begin at whole cache lines and are
mapped when it is read. The header is sealed by a hash and each tensor by a checksum, so that a
file that was torn or damaged is not taken for one. Knows no folder.

Format: https://huggingface.co/docs/safetensors: 8 bytes of header length, a JSON header, which may
end in spaces, then the data without holes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import safetensors
import torch

from services.shard.surgery.stored import StoredModel

_LINE_BYTES = 64
_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
# In place of holes, which the format has not.
_FILLER = "filler."


class Damaged(Exception):
    """A file that is not what was written, or was not written whole."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A file that is to be written."""

    header: bytes
    parts: Sequence[torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(_filled(part.nbytes) for part in self.parts)

    def write(self, file: FileIO) -> None:
        """Takes the room first, so that a full disk is known before anything is written.

        Raises OSError.
        """
        os.posix_fallocate(file.fileno(), 0, self.num_bytes)
        _write(file, memoryview(self.header))
        for part in self.parts:
            _write(file, _bytes(part))
            _write(file, memoryview(bytes(_filled(part.nbytes) - part.nbytes)))


def draft(key: str, model: StoredModel) -> Draft:
    """The file of a model that is packed, under the key that it is to be read with."""
    header: dict[str, Any] = {}
    parts, start = [], 0
    for name, tensor in model.tensors.items():
        part = tensor.contiguous()
        end, filled = start + part.nbytes, start + _filled(part.nbytes)
        header[name] = _entry(_DTYPES[part.dtype], list(part.shape), start, end)
        if filled > end:
            header[f"{_FILLER}{end}"] = _entry("U8", [filled - end], end, filled)
        parts.append(part)
        start = filled
    names = list(model.tensors)
    checksums = dict(zip(names, _checksums(parts), strict=True))
    metadata = {"key": key, "layout": json.dumps(model.layout), "checksums": json.dumps(checksums)}
    header["__metadata__"] = {**metadata, "seal": _seal(metadata, header)}
    text = json.dumps(header).encode()
    text += b" " * (_filled(8 + len(text)) - 8 - len(text))
    return Draft(len(text).to_bytes(8, "little") + text, parts)


def read(path: Path, key: str) -> StoredModel | None:
    """The model in a file, its tensors mapped: not to be written to. None where there is no file.

    Reads all of it once, to compare checksums.

    Raises Damaged.
    """
    try:
        header = _header(path)
        metadata = header.pop("__metadata__")
        seal, checksums = metadata.pop("seal"), json.loads(metadata["checksums"])
        if metadata["key"] != key or seal != _seal(metadata, header):
            raise Damaged("its header is not what was written")
        with safetensors.safe_open(path, framework="pt", device="cpu") as reader:
            tensors = {name: reader.get_tensor(name) for name in checksums}
        layout = json.loads(metadata["layout"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise Damaged(f"it can't be read: {exc}") from exc
    except safetensors.SafetensorError as exc:
        raise Damaged(str(exc)) from exc
    for name, found in zip(checksums, _checksums(list(tensors.values())), strict=True):
        if found != checksums[name]:
            raise Damaged(f"{name} has another checksum")
    return StoredModel(layout, tensors)


def _write(file: FileIO, data: memoryview) -> None:
    while data:  # one call takes 2 GiB at most
        data = data[file.write(data) :]


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise Damaged("it is cut short")
        header: dict[str, Any] = json.loads(file.read(size))
        return header


def _entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _seal(metadata: Mapping[str, str], header: Mapping[str, Any]) -> str:
    sealed = [dict(metadata), {name: one for name, one in header.items() if name[:2] != "__"}]
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def _filled(num_bytes: int) -> int:
    """Up to whole cache lines."""
    return math.ceil(num_bytes / _LINE_BYTES) * _LINE_BYTES


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _checksums(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Side by side: zlib lets other threads run meanwhile, and is slower than memory."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(lambda tensor: zlib.crc32(_bytes(tensor)), tensors))
