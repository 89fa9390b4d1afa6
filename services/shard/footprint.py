"""What a model's weights take, where they are parameters and where they are something else."""

from __future__ import annotations

from torch import nn


class WithoutParameters(nn.Module):
    """A module whose weights are no parameters: codes, or packed for a kernel.

    Attributes:
        num_weights: that it brings; 0 where they are another module's.
        weight_bytes: what it takes in memory.
    """

    def __init__(self, num_weights: int = 0, weight_bytes: int = 0) -> None:
        super().__init__()
        self.num_weights = num_weights
        self.weight_bytes = weight_bytes


def footprint(model: nn.Module) -> tuple[int, int]:
    """(parameters, bytes of weights); what several modules share counts once."""
    parameters = list(model.parameters())
    number = sum(value.numel() for value in parameters)
    size = sum(value.numel() * value.element_size() for value in parameters)
    for module in model.modules():
        if isinstance(module, WithoutParameters):
            number += module.num_weights
            size += module.weight_bytes
    return number, size
