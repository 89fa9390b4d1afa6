"""Which products of a model share an input: found by watching two tokens go through it.

Nothing is multiplied meanwhile: every product gives noise of the right shape, so that it costs
next to nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from services.shard.quantized_layers import QuantizedLinear
from services.shard.row_codes import Codes

_NUM_TOKENS = 2


class NoPages:
    """In place of a PagedContext: keeps nothing, and mixes nothing."""

    def __init__(self, token_slots: torch.Tensor) -> None:
        self.token_slots = token_slots
        nothing: dict[int, None] = defaultdict(lambda: None)
        self.pool = SimpleNamespace(keys=nothing, values=nothing)

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Forgets them."""

    def attend(self, q: torch.Tensor, *_: object) -> torch.Tensor:
        """The queries."""
        return q


def is_product(module: nn.Module) -> bool:
    """A matrix, perhaps with a bias, and nothing else."""
    return isinstance(module, nn.Linear | Conv1D | QuantizedLinear)


def is_experts(module: nn.Module) -> bool:
    """Matrices of which each token meets a few, in one module."""
    return type(module).__name__.endswith("Experts")


def groups_of_products(model: Any) -> list[list[nn.Module]]:
    """Products by the tensor that they were given, in the order of their calls, of a model that has
    its weights and is on the CPU. One that was called never, or twice, shares with nobody."""
    given: dict[int, list[nn.Module]] = {}
    # an address is an identity only while the tensor lives
    alive: list[torch.Tensor] = []
    calls: dict[nn.Module, int] = {}

    def on_product(module: nn.Module, x: torch.Tensor) -> None:
        alive.append(x)
        given.setdefault(id(x), []).append(module)
        calls[module] = calls.get(module, 0) + 1

    with torch.inference_mode(), _noise_for_products(model, on_product):
        _pass(model)
    groups = [[module for module in together if calls[module] == 1] for together in given.values()]
    products = [module for module in model.modules() if is_product(module)]
    groups += [[module] for module in products if calls.get(module) != 1]
    return [group for group in groups if group]


def _pass(model: Any) -> None:
    ids = torch.zeros(1, _NUM_TOKENS, dtype=torch.long)
    slots = torch.arange(_NUM_TOKENS)
    model(input_ids=ids, position_ids=slots[None], use_cache=False, paged=NoPages(slots))


@contextmanager
def _noise_for_products(model: nn.Module, on_product: Any) -> Iterator[None]:
    """Each product's `forward` makes noise, and experts give back what they get."""
    draw = torch.Generator().manual_seed(0)
    replaced: list[nn.Module] = []

    def make(module: nn.Module) -> Any:
        width = num_rows(matrix_of(module))

        def noise(x: torch.Tensor) -> torch.Tensor:
            on_product(module, x)
            return torch.randn(*x.shape[:-1], width, generator=draw).to(x)

        return noise

    try:
        for module in model.modules():
            if is_product(module):
                module.forward = make(module)
            elif is_experts(module):
                module.forward = lambda x, *_: x.clone()
            else:
                continue
            replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward


def matrix_of(module: Any) -> torch.Tensor | Codes:
    """[out, in] of a product."""
    if isinstance(module, QuantizedLinear):
        return module.codes["weight"]
    weight: torch.Tensor = module.weight.detach()
    return weight.t() if isinstance(module, Conv1D) else weight


def num_rows(matrix: torch.Tensor | Codes) -> int:
    """Columns of what the product gives."""
    return len(matrix.codes if isinstance(matrix, Codes) else matrix)
