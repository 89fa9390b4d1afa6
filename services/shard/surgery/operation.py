"""The operation on a model that has its weights: matrices are packed, one copy of each remains;
then what stands around them is fused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from infermesh.telemetry import logs, metrics
from services.shard.host import Releaser
from services.shard.kernels.library import Library
from services.shard.kernels.products import Packer
from services.shard.quantized_layers import Quantized, QuantizedEmbedding, QuantizedExperts
from services.shard.row_codes import Codes
from services.shard.surgery import shortcut
from services.shard.surgery.fusing import Fusing
from services.shard.surgery.packed import (
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    Shared,
    WideEmbedding,
)
from services.shard.surgery.shortcut import Shortcut
from services.shard.surgery.watching import groups_of_products, is_experts, matrix_of

# Whose forward PackedExperts repeats; experts of other classes keep their weights.
_EXPERTS = ("MixtralExperts", "Qwen3MoeExperts")
_log = logs.get(__name__)
_modules = metrics.gauge(
    "shard_kernel_modules", "Parts of the loaded model that run on the C++ kernels.", ("kind",)
)


def pack(model: Any, library: Library) -> None:
    """Packs a model's matrices, and makes float32 of the rest, in place.

    Args:
        model: on the CPU; its parameters are in float32 or bfloat16, or are codes that no one has
            packed yet.
    """
    _Packing(model, library).run()


def fuse(model: Any, library: Library) -> None:
    """Fuses what stands around the matrices of a packed model, in place."""
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    parts = Counter(linear.shared for linear in linears)
    fusing = Fusing(library)
    fusing.run(model)
    merged = sum(count > 1 for count in parts.values())
    counts = {"products": len(parts), "merged": merged, **fusing.counts}
    for kind, count in counts.items():
        _modules.labels(kind).set(count)
    _log.info("the model runs on the C++ kernels", extra=counts)


def find_shortcut(model: Any, library: Library) -> Shortcut | None:
    """The way past the code around a fused model's layers, where there is one."""
    found = shortcut.find(library, model)
    _modules.labels("shortcut").set(found is not None)
    return found


class _Packing:
    def __init__(self, model: Any, library: Library) -> None:
        self._model = model
        self._packer = Packer(library)
        self._releaser = Releaser()
        self._paths = {module: path for path, module in model.named_modules()}

    def run(self) -> None:
        embedding, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        is_tied = _same(_table(embedding), matrix_of(head))
        groups = [alike for group in groups_of_products(self._model) for alike in _alike(group)]
        for group in groups:
            # the head alone, so that rows can be looked up in it
            shared = self._pack(group)
            if group == [head] and is_tied:
                self._put(embedding, PackedEmbedding(embedding, shared.matrix))
                is_tied = False
        for module in list(self._model.modules()):
            self._look_at(module, embedding)
        self._model.float()

    def _pack(self, group: list[Any]) -> Shared:
        """One matrix in place of those of a group; their own are free then."""
        matrices = [matrix_of(module) for module in group]
        biases = [module.bias for module in group]
        shared = Shared(self._packer.pack(matrices, biases))
        # the bytes of all are booked with the first
        num_bytes = shared.matrix.num_bytes
        self._releaser.freed(num_bytes)
        for index, module in enumerate(group):
            size = _num_weights(matrices[index])
            size += 0 if biases[index] is None else biases[index].numel()
            self._put(module, PackedLinear(shared, index, size, 0 if index else num_bytes))
        return shared

    def _look_at(self, module: Any, embedding: nn.Module) -> None:
        """What is no product."""
        name = type(module).__name__
        if isinstance(module, QuantizedExperts):
            experts = [module.each("gate_up_proj"), module.each("down_proj")]
        elif name in _EXPERTS:
            experts = [list(module.gate_up_proj.detach()), list(module.down_proj.detach())]
        elif is_experts(module) and not isinstance(module, PackedExperts):
            _log.warning("experts are computed by torch", extra={"experts": name})
            return
        elif module is embedding and isinstance(module, QuantizedEmbedding):
            module.dtype = torch.float32
            return
        elif module is embedding and module.weight.dtype is not torch.float32:
            self._put(module, WideEmbedding(module, cast(Any, module).weight.detach()))
            return
        else:
            return
        packed = [[self._packer.pack([matrix]) for matrix in each] for each in experts]
        self._put(module, PackedExperts(module.act_fn, *packed))

    def _put(self, old: nn.Module, new: nn.Module) -> None:
        self._model.set_submodule(self._paths[old], new)
        # its weights go now, whoever still knows it
        old._parameters.clear()
        if isinstance(old, Quantized):
            old.codes.clear()


def _alike(group: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Those whose matrices are stored alike may lie in one."""
    found: dict[object, list[nn.Module]] = {}
    for module in group:
        matrix = matrix_of(module)
        kind = matrix.group_size if isinstance(matrix, Codes) else matrix.dtype
        found.setdefault(kind, []).append(module)
    yield from found.values()


def _table(embedding: Any) -> torch.Tensor | Codes:
    if isinstance(embedding, QuantizedEmbedding):
        return embedding.codes["weight"]
    table: torch.Tensor = embedding.weight.detach()
    return table


def _same(table: torch.Tensor | Codes, matrix: torch.Tensor | Codes) -> bool:
    """They are one in memory."""
    own = table.codes if isinstance(table, Codes) else table
    other = matrix.codes if isinstance(matrix, Codes) else matrix
    return own.data_ptr() == other.data_ptr()


def _num_weights(matrix: torch.Tensor | Codes) -> int:
    if isinstance(matrix, Codes):
        return matrix.codes.numel() * (1 if matrix.zeros is None else 2)
    return matrix.numel()
