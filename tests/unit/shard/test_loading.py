"""The loader on directories as they are found: whole, sharded, tied, torn, incomplete, foreign."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from infermesh.config import ShardConfig
from infermesh.errors import InvalidRequest, ModelLoadFailed, OutOfMemory, UnsupportedModel
from services.shard.domain import LoadSpec, Progress
from services.shard.engine import LoadedModel
from services.shard.loading import load_model
from tests.tiny_models import ARCHITECTURES, EOS_ID, IM_END_ID, write_tiny_model, write_tokenizer


def _load(directory: Path | str, **fields: Any) -> LoadedModel:
    spec = LoadSpec(str(directory), **{"num_blocks": 4, **fields})
    return load_model(
        spec, ShardConfig(device="cpu", num_threads=1, kernels="off"), lambda progress: None
    )


def _weights(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    model: Any = loaded.engine._forward._model  # type: ignore[attr-defined]
    return dict(model.state_dict())


def _edit(path: Path, **changes: Any) -> None:
    fields = json.loads(path.read_text())
    fields.update(changes)
    path.write_text(json.dumps(fields))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


@pytest.mark.parametrize("max_shard_size", ["1GB", "60KB"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_load_gives_the_saved_weights_when_files_are_single_or_sharded(
    tmp_path: Path, model_type: str, max_shard_size: str
) -> None:
    directory = write_tiny_model(tmp_path, model_type, max_shard_size=max_shard_size)
    assert (directory / "model.safetensors").exists() == (max_shard_size == "1GB")
    loaded = _load(directory)
    reference = AutoModelForCausalLM.from_pretrained(directory)
    got = _weights(loaded)
    for name, wanted in reference.state_dict().items():
        assert torch.equal(got[name], wanted), name
    for name, wanted in reference.named_buffers():
        held: Any = loaded.engine._forward._model  # type: ignore[attr-defined]
        assert torch.equal(held.get_buffer(name), wanted), name
    assert loaded.manifest.num_parameters == reference.num_parameters()
    assert loaded.manifest.weight_bytes == 4 * reference.num_parameters()


def test_fingerprint_differs_when_answers_end_elsewhere(model: Path) -> None:
    prints = set()
    for eos_token_id in (EOS_ID, IM_END_ID, [EOS_ID, IM_END_ID]):
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
        prints.add(_load(model).manifest.model_fingerprint)
    assert len(prints) == 3


def test_load_shares_memory_when_weights_are_tied(tmp_path: Path) -> None:
    weights = _weights(_load(write_tiny_model(tmp_path, "qwen3")))
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    assert embedding.data_ptr() == head.data_ptr()


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_load_accepts_either_tensor_of_a_pair_when_weights_are_tied(
    tmp_path: Path, kept: str
) -> None:
    write_tiny_model(tmp_path, "qwen3")
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, kept: embedding}, tmp_path / "model.safetensors")
    weights = _weights(_load(tmp_path))
    assert torch.equal(weights["lm_head.weight"], embedding)
    assert torch.equal(weights["model.embed_tokens.weight"], embedding)


def test_load_keeps_both_when_a_tied_pair_differs(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "qwen3")
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] + 1
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    weights = _weights(_load(tmp_path))
    assert torch.equal(weights["lm_head.weight"], head)
    assert not torch.equal(weights["model.embed_tokens.weight"], head)


def test_load_does_not_follow_the_file_when_it_changes_afterwards(model: Path) -> None:
    loaded = _load(model)
    before = {name: value.clone() for name, value in _weights(loaded).items()}
    file = model / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(-4096, 2)
        stream.write(bytes(4096))
    after = _weights(loaded)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_load_casts_when_another_dtype_is_asked_for(model: Path) -> None:
    loaded = _load(model, dtype="bfloat16")
    assert loaded.manifest.dtype == "bfloat16"
    reference = load_file(model / "model.safetensors")
    for name, value in _weights(loaded).items():
        assert torch.equal(value, reference[name].bfloat16())


@pytest.mark.parametrize(("stored", "asked"), [(torch.float16, "auto"), (torch.float32, "float16")])
def test_load_serves_float32_when_a_cpu_is_given_float16(
    tmp_path: Path, stored: torch.dtype, asked: str
) -> None:
    write_tiny_model(tmp_path, dtype=stored)
    assert _load(tmp_path, dtype=asked).manifest.dtype == "float32"


def test_load_reports_bytes_when_it_reads_weights(model: Path) -> None:
    seen: list[Progress] = []
    load_model(
        LoadSpec(str(model), num_blocks=4),
        ShardConfig(device="cpu", num_threads=1, kernels="off"),
        seen.append,
    )
    assert [p.stage for p in seen][:2] == ["finding the model", "importing torch"]
    reading = [p for p in seen if p.stage == "reading weights"]
    assert reading[-1].bytes_done == reading[-1].bytes_total
    assert [p.bytes_done for p in reading] == sorted(p.bytes_done for p in reading)


def test_manifest_prefers_the_generation_config_when_both_name_eos(model: Path) -> None:
    _edit(model / "generation_config.json", eos_token_id=[EOS_ID, IM_END_ID])
    manifest = _load(model, max_model_len=100).manifest
    assert manifest.eos_token_ids == (EOS_ID, IM_END_ID)
    assert manifest.max_model_len == 64  # four blocks of 16
    assert json.loads(manifest.generation_config_json)["eos_token_id"] == [EOS_ID, IM_END_ID]
    assert json.loads(manifest.tokenizer_config_json)["eos_token"]


def test_manifest_takes_the_template_file_when_there_is_one(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert _load(model).manifest.chat_template == "{{ messages }}"


def test_fingerprint_changes_when_weights_dtype_or_tokenizer_change(
    model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    first = _load(model).manifest.model_fingerprint
    assert _load(copy).manifest.model_fingerprint == first
    assert _load(model, dtype="bfloat16").manifest.model_fingerprint != first
    assert _load(model, kv_cache_dtype="float32").manifest.model_fingerprint == first
    assert _load(model, kv_cache_dtype="bfloat16").manifest.model_fingerprint != first
    tokenizer = copy / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert _load(copy).manifest.model_fingerprint != first
    other = write_tiny_model(tmp_path / "other", seed=1)
    assert _load(other).manifest.model_fingerprint != first


def test_dummy_weights_are_the_same_when_loaded_twice_without_a_checkpoint(
    tmp_path: Path, model: Path
) -> None:
    bare = tmp_path / "bare"
    write_tokenizer(bare)
    shutil.copy(model / "config.json", bare)
    one, two = (_weights(_load(bare, load_format="dummy")) for _ in range(2))
    assert all(torch.equal(one[name], value) for name, value in two.items())
    matrix = one["model.layers.1.mlp.up_proj.weight"]
    assert 0.015 < float(matrix.std()) < 0.025
    assert torch.equal(one["model.norm.weight"], torch.ones(48))


def test_load_fails_by_name_when_a_file_is_cut_short(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelLoadFailed, match=r"model\.safetensors has \d+ bytes"):
        _load(model)


@pytest.mark.parametrize("content", [b"", b"\xff" * 400, b"\x10" + bytes(7) + b"{" * 40])
def test_load_fails_by_name_when_a_header_is_torn(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadFailed, match=r"model\.safetensors"):
        _load(model)


def test_load_fails_by_name_when_a_shard_is_missing(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, max_shard_size="60KB")
    missing = sorted(tmp_path.glob("model-*"))[1]
    missing.unlink()
    with pytest.raises(ModelLoadFailed, match=missing.name):
        _load(tmp_path)


def test_load_fails_by_name_when_a_tensor_is_missing(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelLoadFailed, match=r"lacks tensor model\.layers\.1\.mlp\.up_proj"):
        _load(model)


def test_load_fails_by_name_when_a_tensor_is_unexpected(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(5)  # old files have it
    save_file(tensors, model / "model.safetensors")
    _load(model)
    tensors["model.layers.0.adapter.weight"] = torch.zeros(5)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelLoadFailed, match=r"unexpected tensor model\.layers\.0\.adapter"):
        _load(model)


def test_load_fails_by_name_when_a_tensor_has_another_shape(model: Path) -> None:
    _edit(model / "config.json", intermediate_size=100)
    with pytest.raises(ModelLoadFailed, match=r"shape \[.*\], the config wants"):
        _load(model)


def test_load_fails_when_there_is_no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadFailed, match="has no tokenizer"):
        _load(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_load_fails_by_name_when_a_json_file_is_torn(model: Path, name: str) -> None:
    text = (model / name).read_text()
    (model / name).write_text(text[: len(text) // 2])
    with pytest.raises(ModelLoadFailed, match=name):
        _load(model)


def test_load_fails_when_there_are_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelLoadFailed, match="has no safetensors file"):
        _load(model)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "just-a-name", "a/b/c"])
def test_load_fails_when_the_directory_is_not_there(name: str) -> None:
    with pytest.raises(ModelLoadFailed, match="is not a directory"):
        _load(name)


def test_load_fails_in_one_sentence_when_the_hub_is_out_of_reach(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelLoadFailed, match="infermesh-tests/no-such-model"):
        _load("infermesh-tests/no-such-model@main")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; supported are cohere, gemma2"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"model_type": "gpt_oss"}, "gpt_oss"),
        ({"model_type": "llama4_text"}, "llama4_text"),
        ({"model_type": "deepseek_v3"}, "deepseek_v3"),
        ({"model_type": "gemma3"}, "'gemma3' is not supported"),
        ({"rope_parameters": {"rope_type": "proportional", "factor": 2.0}}, "proportional"),
        ({"rope_scaling": {"type": "su"}}, "'su'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequence"),
        ({"architectures": ["LlamaForCausalLMEagle"]}, "must be a LlamaForCausalLM"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map"),
        ({"is_causal": False}, "both directions"),
        ({"use_bidirectional_attention": True}, "both directions"),
        ({"add_cross_attention": True}, "cross-attention"),
        ({"model_type": "mistral", "architectures": [], "layer_types": ["x"]}, "layer_types"),
    ],
)
def test_load_refuses_by_name_when_the_model_would_be_served_wrong(
    model: Path, changes: dict[str, Any], named: str
) -> None:
    _edit(model / "config.json", **changes)
    with pytest.raises(UnsupportedModel, match=named):
        _load(model)


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "int3"},
        {"kv_cache_dtype": "float16"},
        {"load_format": "gguf"},
        {"block_size": 5000},
        {"max_num_seqs": 0},
        {"model": ""},
    ],
)
def test_load_refuses_the_request_when_a_field_is_out_of_range(
    model: Path, fields: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest):
        _load(fields.pop("model", model), **fields)


def test_load_is_out_of_memory_when_not_one_block_fits(model: Path) -> None:
    with pytest.raises(OutOfMemory, match="one block"):
        _load(model, num_blocks=0, kv_cache_bytes=100)


@pytest.mark.parametrize(("kv_cache_dtype", "fit"), [("auto", 10), ("bfloat16", 20)])
def test_load_sizes_the_pool_when_bytes_are_given(
    model: Path, kv_cache_dtype: str, fit: int
) -> None:
    block = 2 * 3 * 16 * 2 * 10 * 4  # K and V, layers, tokens, heads, head_dim, float32
    loaded = _load(
        model, num_blocks=0, kv_cache_bytes=10 * block + 5, kv_cache_dtype=kv_cache_dtype
    )
    assert loaded.capacity.num_blocks == fit
    assert loaded.capacity.kv_cache_bytes == 10 * block


def test_load_takes_no_more_blocks_than_all_slots_can_use_when_memory_is_ample(
    model: Path,
) -> None:
    loaded = _load(model, num_blocks=0, max_num_seqs=3)
    assert loaded.capacity.num_blocks == 3 * 512 // 16


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cuda:x"])
def test_load_refuses_the_device_when_it_is_not_here(model: Path, device: str) -> None:
    with pytest.raises(InvalidRequest, match="device"):
        load_model(LoadSpec(str(model)), ShardConfig(device=device), lambda progress: None)
