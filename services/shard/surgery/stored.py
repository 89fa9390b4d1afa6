"""A model whose matrices are packed, as plain tensors and a description of what belongs where; and
a model made from them, to which its checkpoint is nothing any more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from services.shard.footprint import WithoutParameters
from services.shard.kernels.library import Library
from services.shard.kernels.products import Packed, PackedMatrix, Packer
from services.shard.quantized_layers import QuantizedEmbedding
from services.shard.row_codes import Codes
from services.shard.surgery.packed import (
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    Shared,
    WideEmbedding,
)
from services.shard.weights import set_parameter

_MATRIX_PARTS = ("weights", "scales", "bias")


class CannotStore(Exception):
    """A module holds weights in a way that is not known here; one sentence."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """What is kept of a model.

    Attributes:
        layout: of lists, numbers and names alone, as JSON has them.
        tensors: by the names that the layout has for them.
    """

    layout: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


def describe(model: nn.Module) -> StoredModel:
    """What `restore` needs, of a model that is packed and not fused; the tensors are the model's.

    Raises CannotStore.
    """
    tensors: dict[str, torch.Tensor] = {}
    products: dict[Shared, dict[str, Any]] = {}
    layout: dict[str, Any] = {"products": [], "embeddings": [], "tables": [], "experts": []}
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            if module.shared not in products:
                matrix = _describe_matrix(module.shared.matrix, path, tensors)
                products[module.shared] = {"matrix": matrix, "parts": {}}
            part = [path, module.num_weights, module.weight_bytes]
            products[module.shared]["parts"][str(module.index)] = part
        elif isinstance(module, PackedEmbedding):
            layout["embeddings"].append([path, module.table])
        elif isinstance(module, WideEmbedding):
            tensors[f"{path}.table"] = module.table
            layout["tables"].append([path, module.num_weights, module.weight_bytes])
        elif isinstance(module, QuantizedEmbedding):
            codes = module.codes["weight"]
            tensors[f"{path}.codes"], tensors[f"{path}.scales"] = codes.codes, codes.scales
            layout["tables"].append([path, module.num_weights, module.weight_bytes])
        elif isinstance(module, PackedExperts):
            layout["experts"].append(_describe_experts(module, path, tensors))
        elif isinstance(module, WithoutParameters):
            raise CannotStore(f"{path} is a {type(module).__name__}")
    numbers = {shared.matrix: number for number, shared in enumerate(products)}
    layout["embeddings"] = [[path, numbers[table]] for path, table in layout["embeddings"]]
    layout["products"] = list(products.values())
    layout["parameters"] = _describe_parameters(model, tensors)
    return StoredModel(layout, tensors)


def _describe_matrix(
    matrix: PackedMatrix, name: str, tensors: dict[str, torch.Tensor]
) -> dict[str, Any]:
    packed = matrix.packed
    for part in _MATRIX_PARTS:
        value = getattr(packed, part)
        if value is not None:
            tensors[f"{name}.packed.{part}"] = value
    return {
        "name": name,
        "sizes": list(packed.sizes),
        "num_columns": packed.num_columns,
        "group_size": packed.group_size,
    }


def _describe_experts(
    module: PackedExperts, path: str, tensors: dict[str, torch.Tensor]
) -> dict[str, Any]:
    return {
        "path": path,
        **{
            leaf: [
                _describe_matrix(matrix, f"{path}.{leaf}.{i}", tensors)
                for i, matrix in enumerate(matrices)
            ]
            for leaf, matrices in (("gate_up", module.gate_up), ("down", module.down))
        },
    }


def _describe_parameters(model: nn.Module, tensors: dict[str, torch.Tensor]) -> list[list[str]]:
    """Each with all its names: tied ones are one tensor."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, known_as in names.items():
        tensors[known_as[0]] = parameter.detach()
    return list(names.values())


def restore(model: Any, stored: StoredModel, library: Library) -> None:
    """Puts packed modules and parameters into a model of the same config, in place.

    Args:
        model: on the meta device but for its buffers, or packed already: its tensors then make
            way for the stored ones.
    """
    packer, layout = Packer(library), stored.layout
    matrices = []
    for product in layout["products"]:
        shared = Shared(_matrix(product["matrix"], stored, packer))
        matrices.append(shared.matrix)
        for index, (path, *size) in product["parts"].items():
            model.set_submodule(path, PackedLinear(shared, int(index), *size))
    for path, new in _rest(model, stored, matrices, packer):
        model.set_submodule(path, new)
    for names in layout["parameters"]:
        set_parameter(model, names[0], stored.tensors[names[0]])
        for name in names[1:]:
            place, _, leaf = name.rpartition(".")
            model.get_submodule(place).register_parameter(leaf, model.get_parameter(names[0]))


def _rest(
    model: Any, stored: StoredModel, matrices: list[PackedMatrix], packer: Packer
) -> Iterator[tuple[str, nn.Module]]:
    """Of what is no product, path and module; the module that is there has what is no weight."""
    layout, tensors = stored.layout, stored.tensors
    for path, number in layout["embeddings"]:
        yield path, PackedEmbedding(model.get_submodule(path), matrices[number])
    for path, num_weights, weight_bytes in layout["tables"]:
        original = model.get_submodule(path)
        table: WithoutParameters
        if f"{path}.table" in tensors:
            table = WideEmbedding(original, tensors[f"{path}.table"])
        else:
            table = QuantizedEmbedding(original, torch.float32)
            table.accept("weight", Codes(tensors[f"{path}.codes"], tensors[f"{path}.scales"]))
        table.num_weights, table.weight_bytes = num_weights, weight_bytes
        yield path, table
    for experts in layout["experts"]:
        path = experts["path"]
        gate_up, down = (
            [_matrix(one, stored, packer) for one in experts[leaf]] for leaf in ("gate_up", "down")
        )
        yield path, PackedExperts(model.get_submodule(path).act_fn, gate_up, down)


def _matrix(described: Mapping[str, Any], stored: StoredModel, packer: Packer) -> PackedMatrix:
    weights, scales, bias = (
        stored.tensors.get(f"{described['name']}.packed.{part}") for part in _MATRIX_PARTS
    )
    assert weights is not None
    sizes, num_columns = tuple(described["sizes"]), described["num_columns"]
    return packer.adopt(Packed(sizes, num_columns, described["group_size"], weights, scales, bias))
