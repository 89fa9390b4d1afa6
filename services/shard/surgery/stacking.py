"""Which fused layers run in one call: neighbours whose model does nothing between them, which shows
in that no bit changes when they do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from services.shard.kernels.layers import Room
from services.shard.kernels.library import Library
from services.shard.surgery.fused import FusedLayer, Stack
from services.shard.surgery.trial import NUM_TOKENS, given, page_of


def stack(library: Library, room: Room, model: Any) -> int:
    """Layers that run with others from now on."""
    return sum(len(layers) for layers in list(_runs(model)) if _tried(library, room, model, layers))


def _runs(model: nn.Module) -> Iterator[list[FusedLayer]]:
    """Neighbours in one list of modules."""
    for modules in model.modules():
        if isinstance(modules, nn.ModuleList):
            for _, run in itertools.groupby(modules, lambda module: isinstance(module, FusedLayer)):
                layers = [module for module in run if isinstance(module, FusedLayer)]
                if len(layers) > 1:
                    yield layers


def _tried(library: Library, room: Room, model: Any, layers: list[FusedLayer]) -> bool:
    """Whether they are stacked now; if not, nothing has changed."""
    alone = [layer.stack for layer in layers]
    wanted = _through(library, model, layers)
    _put(layers, [Stack(library, room, layers)] * len(layers))
    got = _through(library, model, layers)
    if wanted and got and all(torch.equal(*pair) for pair in zip(wanted, got, strict=True)):
        return True
    _put(layers, alone)
    return False


def _put(layers: Sequence[FusedLayer], stacks: Sequence[Stack]) -> None:
    for layer, its_own in zip(layers, stacks, strict=True):
        layer.stack = its_own


def _through(library: Library, model: Any, layers: list[FusedLayer]) -> list[torch.Tensor]:
    """What a few tokens become in the model without its head, and what those layers leave in the
    pool; nothing where the model can't be asked like that."""
    page = page_of(library, model)
    positions = torch.arange(NUM_TOKENS)[None]
    decoder = getattr(model, model.base_model_prefix)
    ids = {"input_ids": positions + 1, "position_ids": positions}
    output = given(decoder, **ids, use_cache=False, paged=page)
    if output is None:
        return []
    pools = (page.pool.keys, page.pool.values)
    return [output.last_hidden_state, *(pool[one.layer] for pool in pools for one in layers)]
