"""Weights into place: a model made on the meta device gets its tensors straight from the mapped
files, cast and moved, or quantized, on the way; or random ones, where only speed matters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from torch import nn

from infermesh.errors import ModelLoadFailed, OutOfMemory, UnsupportedModel
from services.shard.checkpoint import Checkpoint, StoredTensor
from services.shard.placement import Place, place_tensors

if TYPE_CHECKING:  # where nothing is quantized it is not imported
    from services.shard.quantizing import Quantizer

FLOATS = ("F64", "F32", "F16", "BF16")
_DUMMY_PERIOD = 1_048_573  # a prime: rows of a matrix start at different places
_DUMMY_SEED = 20_240_101
_DUMMY_PIECE = 1 << 22  # numbers made at a time where they are quantized

OnBytes = Callable[[int], None]


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    tied: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: OnBytes,
    quantize: Callable[[], Quantizer] | None = None,
) -> None:
    """Fills every parameter of `model` from the checkpoint.

    Args:
        tied: parameter → the parameter that it shares.
        on_bytes: told the bytes of each tensor read.
        quantize: replaces the modules that get codes instead of weights.

    Raises:
        ModelLoadFailed: a tensor is missing, unexpected or of another shape; a file is torn.
        OutOfMemory: the device can't hold them.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    places = check_places(model, checkpoint, wanted, tied)
    quantizer = quantize() if quantize is not None else None
    fused: dict[str, torch.Tensor] = {}
    for name, mapped in read_tensors(checkpoint, places):
        place = places[name]
        if quantizer is not None and place.parameter in quantizer.targets:
            quantizer.add(place.parameter, mapped, first_row(place, wanted))
        else:
            _put(model, place, mapped, fused, dtype, device)
        on_bytes(checkpoint.tensors[name].num_bytes)
    stored = {place.parameter for place in places.values()}
    if quantizer is not None:
        quantizer.finish(stored)
        tied = {one: other for one, other in tied.items() if one not in quantizer.targets}
    tie(model, tied, stored)


def check_places(
    model: nn.Module,
    checkpoint: Checkpoint,
    wanted: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, str],
) -> Mapping[str, Place]:
    """Where each stored tensor belongs. Raises ModelLoadFailed or UnsupportedModel."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    places = place_tensors(checkpoint.tensors, wanted, prefix, tied)
    for name, place in places.items():
        _check_tensor(name, checkpoint.tensors[name], place.shape)
    return places


def read_tensors(
    checkpoint: Checkpoint, names: Iterable[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors file by file, mapped: hold none of them for long.

    Raises ModelLoadFailed naming the file that can't be read.
    """
    by_file: dict[Any, list[str]] = {}
    for name in names:
        by_file.setdefault(checkpoint.tensors[name].file, []).append(name)
    for file, inside in by_file.items():
        try:
            with safetensors.safe_open(file, framework="pt", device="cpu") as reader:
                for name in inside:
                    yield name, reader.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as exc:
            raise ModelLoadFailed(f"{file} is not a readable safetensors file: {exc}") from exc


def dummy_weights(
    model: nn.Module,
    tied: Mapping[str, str],
    std: float,
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: OnBytes,
    quantize: Callable[[], Quantizer] | None = None,
) -> None:
    """Random weights from a fixed seed, normal with `std`; norms are near one, biases near zero.

    One table of noise, tiled: a billion fresh normal numbers would take as long as a download.
    """
    generator = torch.Generator().manual_seed(_DUMMY_SEED)
    noise = torch.randn(_DUMMY_PERIOD, generator=generator).mul_(std).to(device, dtype)
    wanted = {name: value.shape for name, value in model.state_dict().items() if name not in tied}
    centred = {name for name in wanted if name.endswith("weight")}
    centred = {name for name in centred if _is_centred_at_zero(model, name)}
    quantizer = quantize() if quantize is not None else None
    offset = 0
    for name, shape in wanted.items():
        if quantizer is not None and name in quantizer.targets:
            offset = _quantized_dummy(quantizer, name, shape, noise, offset, on_bytes)
            continue
        value = _allocated(shape, dtype, device)
        if value.dim() < 2:
            value.fill_(1.0 if name.endswith("weight") and name not in centred else 0.0)
        else:
            offset = _tile(value.view(-1), noise, offset)
        set_parameter(model, name, value)
        on_bytes(value.numel() * value.element_size())
    if quantizer is not None:
        quantizer.finish(set())
        tied = {one: other for one, other in tied.items() if one not in quantizer.targets}
    tie(model, tied, set())


def _quantized_dummy(
    quantizer: Quantizer,
    name: str,
    shape: torch.Size,
    noise: torch.Tensor,
    offset: int,
    on_bytes: OnBytes,
) -> int:
    """The same values, made and quantized piece by piece; returns the next offset."""
    num_rows, width = shape.numel() // shape[-1], shape[-1]
    transposed = quantizer.targets[name].transposed
    step = num_rows if transposed else max(1, _DUMMY_PIECE // width)
    for start in range(0, num_rows, step):
        piece = noise.new_empty(min(step, num_rows - start), width)
        offset = _tile(piece.view(-1), noise, offset)
        quantizer.add(name, piece, start)
        on_bytes(piece.numel() * piece.element_size())
    return offset


def set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Puts a tensor in the place of a meta parameter."""
    path, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(value, requires_grad=False)
    model.get_submodule(path).register_parameter(leaf, parameter)


def put_whole(
    model: nn.Module,
    name: str,
    mapped: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> None:
    """Copies a tensor into memory of our own: a file that changes on disk must not change the
    model."""
    device = device or torch.device("cpu")
    set_parameter(model, name, _allocated(mapped.shape, dtype, device).copy_(mapped))


def _put(
    model: nn.Module,
    place: Place,
    mapped: torch.Tensor,
    fused: dict[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """`fused` holds the parameters that are filled expert by expert."""
    name = place.parameter
    if place.expert is None:
        put_whole(model, name, mapped, dtype, device)
        return
    if name not in fused:
        fused[name] = _allocated(model.get_parameter(name).shape, dtype, device)
        set_parameter(model, name, fused[name])
    fused[name][place.expert, place.start : place.end].copy_(mapped)


def first_row(place: Place, wanted: Mapping[str, tuple[int, ...]]) -> int:
    """Of a place in its parameter, experts lying one below the other."""
    return 0 if place.expert is None else place.expert * wanted[place.parameter][1] + place.start


def _check_tensor(name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ModelLoadFailed(
            f"{tensor.file.name}: tensor {name} has shape {list(tensor.shape)}, "
            f"the config wants {list(shape)}"
        )
    if tensor.dtype not in FLOATS:
        raise UnsupportedModel(
            f"{tensor.file.name}: tensor {name} is stored as {tensor.dtype}, "
            f"supported are {', '.join(FLOATS)}"
        )


def _allocated(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError as exc:  # torch.OutOfMemoryError on CUDA, RuntimeError on CPU
        raise OutOfMemory(f"the weights don't fit the memory of {device}") from exc


def tie(model: nn.Module, tied: Mapping[str, str], stored: Set[str]) -> None:
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
