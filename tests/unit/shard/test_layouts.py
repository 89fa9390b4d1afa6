"""Checkpoints that name their tensors otherwise than the model does: experts one by one, GPT-2's
missing prefix and causal masks, Phi-3's own code beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from infermesh.config import ShardConfig
from infermesh.errors import ModelLoadFailed
from services.shard.domain import LoadSpec
from services.shard.loading import load_model
from tests.tiny_models import write_tiny_model

# One tensor of a layer's expert 0, as published.
EXPERT_TENSORS = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.0.w3.weight",
    "qwen3_moe": "model.layers.2.mlp.experts.0.up_proj.weight",
}


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    spec = LoadSpec(str(directory), num_blocks=4)
    loaded = load_model(
        spec, ShardConfig(device="cpu", num_threads=1, kernels="off"), lambda progress: None
    )
    model: Any = loaded.engine._forward._model  # type: ignore[attr-defined]
    return dict(model.state_dict())


def _assert_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("model_type", EXPERT_TENSORS)
def test_experts_are_loaded_when_stored_one_by_one_or_fused(
    tmp_path: Path, model_type: str
) -> None:
    file = write_tiny_model(tmp_path, model_type) / "model.safetensors"
    # What save_pretrained writes is the published layout.
    assert EXPERT_TENSORS[model_type] in load_file(file)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    _assert_equal(_weights(tmp_path), wanted)
    save_file({name: value.contiguous() for name, value in wanted.items()}, file)
    _assert_equal(_weights(tmp_path), wanted)


@pytest.mark.parametrize("model_type", EXPERT_TENSORS)
def test_load_fails_by_name_when_one_expert_is_missing_or_too_many(
    tmp_path: Path, model_type: str
) -> None:
    file = write_tiny_model(tmp_path, model_type) / "model.safetensors"
    name = EXPERT_TENSORS[model_type]
    tensors = load_file(file)
    one_more = {**tensors, name.replace("experts.0", "experts.5"): tensors[name].clone()}
    save_file(one_more, file)
    with pytest.raises(ModelLoadFailed, match=r"unexpected tensor .*experts\.5"):
        _weights(tmp_path)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(ModelLoadFailed, match=r"lacks an expert of .*experts\.gate_up_proj"):
        _weights(tmp_path)


def test_gpt2_is_loaded_when_stored_without_prefix_and_with_masks(tmp_path: Path) -> None:
    file = write_tiny_model(tmp_path, "gpt2") / "model.safetensors"
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    stored = load_file(file)
    assert all(name.startswith("transformer.") for name in stored)
    bare = {name.removeprefix("transformer."): value for name, value in stored.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 512, 512, dtype=torch.bool)
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(bare, file)
    _assert_equal(_weights(tmp_path), wanted)


def test_load_fails_by_name_when_a_tensor_is_there_twice(tmp_path: Path) -> None:
    file = write_tiny_model(tmp_path, "gpt2") / "model.safetensors"
    stored = load_file(file)
    save_file({**stored, "wpe.weight": stored["transformer.wpe.weight"].clone()}, file)
    with pytest.raises(ModelLoadFailed, match=r"twice: .*wpe\.weight"):
        _weights(tmp_path)


def test_phi3_is_loaded_when_its_repository_carries_the_same_class_as_code(tmp_path: Path) -> None:
    config = write_tiny_model(tmp_path, "phi3") / "config.json"
    fields = json.loads(config.read_text())
    fields["auto_map"] = {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    }
    config.write_text(json.dumps(fields))
    assert "model.layers.0.self_attn.qkv_proj.weight" in _weights(tmp_path)
