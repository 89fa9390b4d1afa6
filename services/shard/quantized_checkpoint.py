"""Quantized checkpoints: how codes are named in safetensors files, reading and writing them.

`NAME` holds a parameter's codes, `NAME_scale` and `NAME_zero` what they mean (see `row_codes`);
experts lie one below the other. Everything else stands as it stood in the plain checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from infermesh.errors import ModelLoadFailed
from services.shard.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from services.shard.placement import place_tensors
from services.shard.quantization import Scheme
from services.shard.quantizing import Quantizer
from services.shard.row_codes import Codes
from services.shard.weights import (
    FLOATS,
    check_places,
    first_row,
    put_whole,
    read_tensors,
    tie,
)

SUFFIXES = ("", "_scale", "_zero")
_NAMES = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
}


def named_parts(name: str, codes: Codes) -> dict[str, torch.Tensor]:
    """The tensors that a parameter's codes are stored as."""
    return {name + suffix: part for suffix, part in zip(SUFFIXES, codes.parts(), strict=False)}


def load_codes(
    model: nn.Module,
    checkpoint: Checkpoint,
    tied: Mapping[str, str],
    dtype: torch.dtype,
    on_bytes: Callable[[int], None],
    quantize: Callable[[], Quantizer],
) -> None:
    """Fills a model on the meta device from a quantized checkpoint; nothing is quantized again.

    Raises:
        ModelLoadFailed: a tensor is missing, unexpected, or of another type or shape than the
            config makes it; a file is torn.
    """
    wanted: dict[str, Any] = dict(model.state_dict())
    quantizer = quantize()
    owner: dict[str, str] = {}
    for name, target in quantizer.targets.items():
        del wanted[name]
        with torch.device("meta"):
            empty = Codes.empty(target.num_rows, target.num_columns, target.group_size)
        wanted.update(named_parts(name, empty))
        owner.update(dict.fromkeys(named_parts(name, empty), name))
    shapes = {name: tuple(value.shape) for name, value in wanted.items()}
    places = place_tensors(checkpoint.tensors, shapes, "", _tied_parts(tied, owner))
    stored = {place.parameter for place in places.values()}
    for name in places:
        _check(name, checkpoint, wanted[name], is_code=name in owner)
    for name, mapped in read_tensors(checkpoint, places):
        if name in owner:
            parameter = owner[name]
            quantizer.take(parameter, SUFFIXES.index(name.removeprefix(parameter)), mapped)
        else:
            put_whole(model, name, mapped, dtype)
        on_bytes(checkpoint.tensors[name].num_bytes)
    quantizer.finish(stored)
    tie(model, {one: other for one, other in tied.items() if one not in owner}, stored)


def _tied_parts(tied: Mapping[str, str], owner: Mapping[str, str]) -> dict[str, str]:
    return {
        one + suffix: other + suffix
        for one, other in tied.items()
        for suffix in (SUFFIXES if one in owner else ("",))
    }


def _check(name: str, checkpoint: Checkpoint, wanted: torch.Tensor, *, is_code: bool) -> None:
    tensor = checkpoint.tensors[name]
    if tensor.shape != tuple(wanted.shape):
        raise ModelLoadFailed(
            f"{tensor.file.name}: tensor {name} has shape {list(tensor.shape)}, "
            f"the config wants {list(wanted.shape)}"
        )
    allowed = [_NAMES[wanted.dtype]] if is_code else list(FLOATS)
    if tensor.dtype not in allowed:
        raise ModelLoadFailed(
            f"{tensor.file.name}: tensor {name} is stored as {tensor.dtype}, "
            f"the config wants {' or '.join(allowed)}"
        )


class Writer:
    """Safetensors files of bounded size, and their index where there are several."""

    def __init__(self, directory: Path, max_file_bytes: int = 1 << 30) -> None:
        self._directory = directory
        self._max_file_bytes = max_file_bytes
        self._held: dict[str, torch.Tensor] = {}
        self._held_bytes = 0
        self._weight_map: dict[str, str] = {}
        self._num_files = 0
        self.num_bytes = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes tensors; the file is written once enough came."""
        size = sum(value.numel() * value.element_size() for value in tensors.values())
        self._held |= tensors
        self._held_bytes += size
        self.num_bytes += size
        if self._held_bytes >= self._max_file_bytes:
            self._flush()

    def close(self) -> None:
        """Writes the rest, and gives the files the names by which they are found."""
        if self._held:
            self._flush()
        if self._num_files == 1:
            (self._directory / _file_name(1)).rename(self._directory / SINGLE_NAME)
            return
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": self._weight_map}
        (self._directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        self._num_files += 1
        name = _file_name(self._num_files)
        try:
            save_file(self._held, self._directory / name, metadata={"format": "pt"})
        except (SafetensorError, OSError) as exc:
            raise ModelLoadFailed(f"{self._directory / name} can't be written: {exc}") from exc
        self._weight_map |= dict.fromkeys(self._held, name)
        self._held, self._held_bytes = {}, 0


def _file_name(number: int) -> str:
    return f"model-{number:05}.safetensors"


def write_codes(
    model: Any, checkpoint: Checkpoint, tied: Mapping[str, str], scheme: Scheme, out: Writer
) -> None:
    """Quantizes a plain checkpoint tensor by tensor, as a load of `model` would, into `out`.

    Raises ModelLoadFailed as `weights.load_weights` does.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    places = check_places(model, checkpoint, wanted, tied)
    stored = {place.parameter for place in places.values()}

    def done(name: str, codes: Codes) -> None:
        if not quantizer.targets[name].module.shares_weights:
            out.add(named_parts(name, codes))

    quantizer = Quantizer(model, scheme, tied, torch.float32, done)
    for name, mapped in read_tensors(checkpoint, places):
        place = places[name]
        if place.parameter in quantizer.targets:
            quantizer.add(place.parameter, mapped, first_row(place, wanted))
        else:
            out.add({place.parameter: mapped.clone()})
    quantizer.finish(stored)
    out.close()
