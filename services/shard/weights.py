"""Weights into place: a model made on the meta device gets its tensors straight from the mapped
files, cast and moved as they are copied; or random ones, where only speed matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

import safetensors
import torch
from torch import nn

from infermesh.errors import ModelLoadFailed, OutOfMemory, UnsupportedModel
from services.shard.checkpoint import Checkpoint, StoredTensor
from services.shard.placement import Place, place_tensors

_FLOATS = ("F64", "F32", "F16", "BF16")
_DUMMY_PERIOD = 1_048_573  # a prime: rows of a matrix start at different places
_DUMMY_SEED = 20_240_101

OnBytes = Callable[[int], None]


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    tied: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: OnBytes,
) -> None:
    """Fills every parameter of `model` from the checkpoint.

    Args:
        tied: parameter → the parameter that it shares.
        on_bytes: told the bytes of each tensor read.

    Raises:
        ModelLoadFailed: a tensor is missing, unexpected or of another shape; a file is torn.
        OutOfMemory: the device can't hold them.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    prefix = str(getattr(model, "base_model_prefix", ""))
    places = place_tensors(checkpoint.tensors, wanted, prefix, tied)
    by_file: dict[Any, list[str]] = {}
    for name, place in places.items():
        _check_tensor(name, checkpoint.tensors[name], place.shape)
        by_file.setdefault(checkpoint.tensors[name].file, []).append(name)
    fused: dict[str, torch.Tensor] = {}
    for file, names in by_file.items():
        try:
            with safetensors.safe_open(file, framework="pt", device="cpu") as reader:
                for name in names:
                    _put(model, places[name], reader.get_tensor(name), fused, dtype, device)
                    on_bytes(checkpoint.tensors[name].num_bytes)
        except (safetensors.SafetensorError, OSError) as exc:
            raise ModelLoadFailed(f"{file} is not a readable safetensors file: {exc}") from exc
    _tie(model, tied, {place.parameter for place in places.values()})


def dummy_weights(
    model: nn.Module,
    tied: Mapping[str, str],
    std: float,
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: OnBytes,
) -> None:
    """Random weights from a fixed seed, normal with `std`; norms are near one, biases near zero.

    One table of noise, tiled: a billion fresh normal numbers would take as long as a download.
    """
    generator = torch.Generator().manual_seed(_DUMMY_SEED)
    noise = torch.randn(_DUMMY_PERIOD, generator=generator).mul_(std).to(device, dtype)
    offset = 0
    for name, meta in list(model.state_dict().items()):
        if name in tied:
            continue
        value = _allocated(meta.shape, dtype, device)
        if value.dim() < 2:
            norm = name.endswith("weight") and not _is_centred_at_zero(model, name)
            value.fill_(1.0 if norm else 0.0)
        else:
            offset = _tile(value.view(-1), noise, offset)
        set_parameter(model, name, value)
        on_bytes(value.numel() * value.element_size())
    _tie(model, tied, set())


def set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Puts a tensor in the place of a meta parameter."""
    path, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(value, requires_grad=False)
    model.get_submodule(path).register_parameter(leaf, parameter)


def _put(
    model: nn.Module,
    place: Place,
    mapped: torch.Tensor,
    fused: dict[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Copies a tensor into memory of our own: a file that changes on disk must not change the
    model. `fused` holds the parameters that are filled expert by expert."""
    name = place.parameter
    if place.expert is None:
        set_parameter(model, name, _allocated(mapped.shape, dtype, device).copy_(mapped))
        return
    if name not in fused:
        fused[name] = _allocated(model.get_parameter(name).shape, dtype, device)
        set_parameter(model, name, fused[name])
    fused[name][place.expert, place.start : place.end].copy_(mapped)


def _check_tensor(name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ModelLoadFailed(
            f"{tensor.file.name}: tensor {name} has shape {list(tensor.shape)}, "
            f"the config wants {list(shape)}"
        )
    if tensor.dtype not in _FLOATS:
        raise UnsupportedModel(
            f"{tensor.file.name}: tensor {name} is stored as {tensor.dtype}, "
            f"supported are {', '.join(_FLOATS)}"
        )


def _allocated(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError as exc:  # torch.OutOfMemoryError on CUDA, RuntimeError on CPU
        raise OutOfMemory(f"the weights don't fit the memory of {device}") from exc


def _tie(model: nn.Module, tied: Mapping[str, str], stored: Set[str]) -> None:
    """As transformers does: where a checkpoint has both of a pair and they differ, both stay."""
    for target, source in tied.items():
        if target in stored and source not in stored:
            target, source = source, target
        value = model.get_parameter(source)
        if target in stored and not torch.equal(model.get_parameter(target), value):
            continue
        path, _, leaf = target.rpartition(".")
        model.get_submodule(path).register_parameter(leaf, value)


def _is_centred_at_zero(model: nn.Module, name: str) -> bool:
    """Gemma's norms multiply by 1 + weight."""
    return "Gemma" in type(model.get_submodule(name.rpartition(".")[0])).__name__


def _tile(flat: torch.Tensor, noise: torch.Tensor, offset: int) -> int:
    """Fills `flat` with the noise from `offset` on, round and round; returns the next offset."""
    head = min(flat.numel(), (len(noise) - offset) % len(noise))
    flat[:head] = noise[offset : offset + head]
    whole, rest = divmod(flat.numel() - head, len(noise))
    flat[head : flat.numel() - rest].view(whole, len(noise)).copy_(noise)
    flat[flat.numel() - rest :] = noise[:rest]
    return (offset + flat.numel()) % len(noise)
