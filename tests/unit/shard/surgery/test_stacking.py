"""Layers that run in one call: when they do, and that what a pass left behind harms no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from services.shard.kernels.layers import Room
from services.shard.surgery.fused import FusedLayer, Stack
from services.shard.surgery.stacking import stack
from services.shard.surgery.trial import NUM_TOKENS, one_page
from tests.compiled_kernels import needs_kernels
from tests.tiny_models import write_tiny_model
from tests.unit.shard.surgery.test_surgery import load

pytestmark = needs_kernels


class Loaded:
    """A tiny model with three fused layers, each alone."""

    def __init__(self, directory: Path) -> None:
        self.model = load(write_tiny_model(directory, "llama"))
        self.layers: list[Any] = list(self.model.model.layers)
        self.library = self.layers[0].stack._kernel._library
        for layer in self.layers:
            layer.stack = Stack(self.library, Room(), [layer])

    def stack(self) -> int:
        with torch.inference_mode():
            return stack(self.library, Room(), self.model)

    def states(self) -> torch.Tensor:
        parts = self.layers[0].parts
        heads = parts.qkv.sizes[parts.order[1]] // parts.head_dim
        page = one_page(self.library, len(self.layers), heads, parts.head_dim)
        ids = torch.arange(NUM_TOKENS)[None]
        with torch.inference_mode():
            output = self.model.model(ids + 7, position_ids=ids, use_cache=False, paged=page)
        found: torch.Tensor = output.last_hidden_state
        return found


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    return Loaded(tmp_path)


def test_layers_are_stacked_when_nothing_is_between_them(loaded: Loaded) -> None:
    wanted = loaded.states()
    assert loaded.stack() == len(loaded.layers)
    assert len({id(layer.stack) for layer in loaded.layers}) == 1
    assert torch.equal(loaded.states(), wanted)


def test_layers_stay_alone_when_the_model_changes_what_is_between_them(loaded: Loaded) -> None:
    loaded.layers[1].register_forward_pre_hook(lambda _, given: (2 * given[0],))
    wanted = loaded.states()
    assert loaded.stack() == 0
    assert torch.equal(loaded.states(), wanted)


def test_layers_stay_alone_when_the_model_keeps_what_is_between_them(loaded: Loaded) -> None:
    kept: list[torch.Tensor] = []
    loaded.layers[0].register_forward_hook(lambda _, __, out: kept.append(out.clone()))
    loaded.model.model.norm.register_forward_pre_hook(lambda _, given: (given[0] + kept[-1],))
    wanted = loaded.states()
    assert loaded.stack() == 0
    assert torch.equal(loaded.states(), wanted)


def test_a_pass_that_broke_off_leaves_nothing_behind(loaded: Loaded) -> None:
    loaded.stack()
    wanted = loaded.states()

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    hook = loaded.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        loaded.states()
    hook.remove()
    assert torch.equal(loaded.states(), wanted)


def test_every_layer_of_a_loaded_model_has_the_same_stack(tmp_path: Path) -> None:
    model = load(write_tiny_model(tmp_path, "gemma3_text"))
    layers = [module for module in model.modules() if isinstance(module, FusedLayer)]
    assert len(layers) == 4  # windows alternate: two kinds of tables
    assert len({id(layer.stack) for layer in layers}) == 1
