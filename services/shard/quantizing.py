"""Quantization while a model is loaded: which parameters become codes, and their way there, piece
by piece. A parameter's float values are never whole here unless they come whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from infermesh.errors import InvalidRequest, ModelLoadFailed
from infermesh.telemetry import logs
from services.shard.host import Releaser
from services.shard.quantization import Scheme
from services.shard.quantized_layers import (
    Quantized,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    is_available,
    takes_int4,
)
from services.shard.row_codes import Codes

# Whose forward QuantizedExperts repeats; experts of other classes keep their weights.
_EXPERTS = ("MixtralExperts", "Qwen3MoeExperts")
_log = logs.get(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """One parameter that becomes codes: `num_rows` over all experts, of `num_columns` each."""

    module: Quantized
    leaf: str
    num_rows: int
    num_columns: int
    group_size: int
    transposed: bool = False


class Quantizer:
    """Replaces a model's modules, then takes their weights."""

    def __init__(
        self,
        model: Any,
        scheme: Scheme,
        tied: Mapping[str, str],
        dtype: torch.dtype,
        on_complete: Callable[[str, Codes], None] | None = None,
    ) -> None:
        """Replaces the modules of a model on the meta device.

        Args:
            tied: parameter → the parameter that it shares.
            dtype: of what is looked up in the embedding.
            on_complete: takes a parameter's name and codes instead of its module.

        Raises InvalidRequest where torch has no kernels for it.
        """
        if not is_available():
            raise InvalidRequest("quantize needs an x86 CPU", param="quantize")
        self.targets: dict[str, Target] = {}
        self._tied = tied
        self._codes: dict[str, Codes] = {}
        self._releaser = Releaser()
        # rows of each part that are still to come
        self._missing: dict[str, int] = {}
        self._on_complete = on_complete or self._into_module
        self._replace(model, scheme, dtype)
        self._report(scheme)

    def _replace(self, model: Any, scheme: Scheme, dtype: torch.dtype) -> None:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        for path, module in list(model.named_modules()):
            leaves = dict(module.named_parameters(recurse=False))
            new: Quantized
            if module is embedding:
                new, names = QuantizedEmbedding(module, dtype), ["weight"]
            elif isinstance(module, nn.Linear | Conv1D):
                new, names = QuantizedLinear(module), ["weight"]
            elif type(module).__name__ in _EXPERTS:
                new, names = QuantizedExperts(module), ["gate_up_proj", "down_proj"]
            else:
                continue
            in_8_bits = module is embedding or module is head
            group_size = 0 if in_8_bits else scheme.group_size
            for name in names:
                transposed = isinstance(module, Conv1D)
                target = _target(new, name, leaves[name].shape, group_size, transposed)
                self.targets[f"{path}.{name}"] = target
            model.set_submodule(path, new)

    def _report(self, scheme: Scheme) -> None:
        in_8_bits = [name for name, target in self.targets.items() if not target.group_size]
        _log.info(
            "weights are quantized",
            extra={
                "scheme": str(scheme),
                "int4_matrices": len(self.targets) - len(in_8_bits),
                "int8_matrices": len(in_8_bits),
            },
        )

    def add(self, name: str, matrix: torch.Tensor, start: int = 0) -> None:
        """Quantizes rows of a parameter from row `start` on; experts lie one below the other.

        Raises ModelLoadFailed where a value is not finite.
        """
        target = self.targets[name]
        rows = matrix.t() if target.transposed else matrix.reshape(-1, target.num_columns)
        if not self._room(name).rows(start, start + len(rows)).quantize_(rows):
            raise ModelLoadFailed(f"{name} can't be quantized: it has values that are not finite")
        self._came(name, len(rows))

    def take(self, name: str, part: int, stored: torch.Tensor) -> None:
        """Takes a part of a parameter's codes as it was stored: codes, scales or zeros.

        Raises ModelLoadFailed where a value is not finite.
        """
        parts = self._room(name).parts()
        if part and not bool(torch.isfinite(stored).all()):
            raise ModelLoadFailed(f"{name} can't be used: its scales are not finite")
        parts[part].copy_(stored)
        self._came(name, self.targets[name].num_rows, len(parts))

    def finish(self, stored: Set[str]) -> None:
        """Packs what is tied, as transformers ties: where both of a pair are stored and differ,
        both stay.

        Args:
            stored: the parameters that the checkpoint had.
        """
        for target, source in self._tied.items():
            if target in stored and source not in stored:
                target, source = source, target
            if target not in self._codes or self._codes[target].equal(self._codes[source]):
                self._codes[target] = self._codes[source]
                self.targets[target].module.shares_weights = True
        for name in list(self._codes):
            self._on_complete(name, self._codes.pop(name))

    def _room(self, name: str) -> Codes:
        target = self.targets[name]
        if name not in self._codes:
            self._codes[name] = Codes.empty(target.num_rows, target.num_columns, target.group_size)
        return self._codes[name]

    def _came(self, name: str, num_rows: int, num_parts: int = 1) -> None:
        self._releaser.freed(num_rows * self.targets[name].num_columns * torch.float32.itemsize)
        missing = self._missing.get(name, self.targets[name].num_rows * num_parts) - num_rows
        self._missing[name] = missing
        is_tied = name in self._tied or name in self._tied.values()
        if missing == 0 and not is_tied:
            self._on_complete(name, self._codes.pop(name))

    def _into_module(self, name: str, codes: Codes) -> None:
        target = self.targets[name]
        target.module.accept(target.leaf, codes)


def _target(
    module: Quantized, leaf: str, shape: torch.Size, group_size: int, transposed: bool
) -> Target:
    *_, rows, columns = reversed(shape) if transposed else shape
    num_matrices = shape[0] if len(shape) == 3 else 1
    if group_size and not takes_int4(rows, columns, group_size):
        group_size = 0
    return Target(module, leaf, num_matrices * rows, columns, group_size, transposed)
