"""A way past the code around a model's modules: where there is one, and that it changes no bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from services.shard.kernels.library import Library
from services.shard.surgery.fused import Stack
from services.shard.surgery.shortcut import Shortcut, find
from tests.compiled_kernels import needs_kernels
from tests.tiny_models import write_tiny_model
from tests.unit.shard.quantized_models import load, mixed_logits

pytestmark = needs_kernels
SEQUENCES = [[7 * i % 300 + 4 for i in range(length)] for length in (40, 13, 5, 1)]


@pytest.fixture
def loaded(tmp_path: Path) -> Any:
    return load(write_tiny_model(tmp_path, "llama"))


def find_in(loaded: Any) -> Shortcut | None:
    model = loaded.engine._forward._model
    library: Library = model.model.layers[0].stack._kernel._library
    return find(library, model)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "olmo2", "qwen2", "qwen3"])
@pytest.mark.parametrize("quantize", ["", "int8", "int4"])
def test_not_one_bit_differs_from_the_models_own_way(
    model_type: str, quantize: str, tmp_path: Path
) -> None:
    loaded: Any = load(write_tiny_model(tmp_path, model_type), quantize=quantize)
    forward = loaded.engine._forward
    assert forward._shortcut is not None
    short = mixed_logits(loaded, SEQUENCES, random.Random(1))
    forward._shortcut = None
    own = mixed_logits(loaded, SEQUENCES, random.Random(1))
    assert {i for i, _ in own} == set(range(len(SEQUENCES)))
    assert own.keys() == short.keys()
    assert all(torch.equal(short[at], own[at]) for at in own)


def test_rotary_tables_come_from_the_module_that_chooses_them_by_sequence(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": 16,
        **factors,
    }
    fields: dict[str, Any] = {
        "rope_parameters": rope,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }
    loaded: Any = load(write_tiny_model(tmp_path, "llama", **fields))
    forward = loaded.engine._forward
    assert forward._shortcut is not None
    assert forward._rope is not None
    assert forward._shortcut.rotary is forward._rope


def next_ids(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "input_ids": kwargs["input_ids"] + 1}


def later(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "position_ids": kwargs["position_ids"] + 1}


def doubled_states(_: Any, args: Any, output: Any) -> None:
    output["last_hidden_state"] = 2 * output.last_hidden_state


def capped_logits(_: Any, args: Any, output: Any) -> None:
    output["logits"] = 30 * (output.logits / 30).tanh()


def doubled_input(_: Any, args: Any) -> Any:
    return 2 * args[0], *args[1:]


CHANGES: dict[str, Callable[[Any], object]] = {
    "ids": lambda model: model.register_forward_pre_hook(next_ids, with_kwargs=True),
    "positions": lambda model: model.register_forward_pre_hook(later, with_kwargs=True),
    "before the layers": lambda model: model.model.layers[0].register_forward_pre_hook(
        doubled_input
    ),
    "states": lambda model: model.model.register_forward_hook(doubled_states),
    "logits": lambda model: model.register_forward_hook(capped_logits),
}


@pytest.mark.parametrize("where", CHANGES)
def test_there_is_none_where_the_model_does_more(where: str, loaded: Any) -> None:
    assert find_in(loaded) is not None
    CHANGES[where](loaded.engine._forward._model)
    assert find_in(loaded) is None


def test_there_is_none_where_a_layer_runs_alone(loaded: Any) -> None:
    layers = loaded.engine._forward._model.model.layers
    kernel = layers[0].stack._kernel
    layers[1].stack = Stack(kernel._library, kernel._room, [layers[1]])
    assert find_in(loaded) is None
