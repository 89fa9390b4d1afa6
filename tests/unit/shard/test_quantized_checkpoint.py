"""Quantized checkpoints: the same model as quantizing at load; one sentence for what is wrong."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infermesh.config import ShardConfig
from infermesh.errors import InvalidRequest, ModelLoadFailed, UnsupportedModel
from services.shard import quantization, quantized_checkpoint, quantized_layers
from services.shard.domain import LoadSpec
from services.shard.loading import load_model
from services.shard.model_files import read_model_files
from services.shard.quantization import Scheme
from services.shard.quantize import quantize
from services.shard.torch_loading import TorchLoader
from tests.architectures import ARCHITECTURES, VOCAB_SIZE
from tests.tiny_models import write_tiny_model
from tests.unit.shard.quantized_models import load, mixed_logits, wide_fields

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "plain", **wide_fields("llama"))


@pytest.fixture
def quantized(plain: Path, tmp_path: Path) -> Path:
    quantize(str(plain), tmp_path / "int4", "int4")
    return tmp_path / "int4"


def _tokens(num: int) -> list[list[int]]:
    rng = random.Random(num)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in (num, 9)]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_checkpoint_gives_the_bits_of_quantizing_at_load(
    model_type: str, scheme: str, tmp_path: Path
) -> None:
    plain = write_tiny_model(
        tmp_path / "plain", model_type, dtype=torch.bfloat16, **wide_fields(model_type)
    )
    out = tmp_path / "out"
    assert scheme in quantize(str(plain), out, scheme)
    one, two = load(plain, quantize=scheme, dtype="float32"), load(out, dtype="float32")
    for left, right in zip(
        *(mixed_logits(model, _tokens(30), random.Random(0)).values() for model in (one, two)),
        strict=True,
    ):
        assert torch.equal(left, right)
    assert one.manifest.quantization == two.manifest.quantization
    assert one.manifest.weight_bytes == two.manifest.weight_bytes
    assert one.manifest.num_parameters == two.manifest.num_parameters
    assert not (tmp_path / "out.partial").exists()


def test_checkpoint_is_read_from_several_files(plain: Path, tmp_path: Path) -> None:
    quantize(str(plain), tmp_path / "one", "int8")
    original = quantized_checkpoint.Writer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized_checkpoint, "Writer", lambda folder: original(folder, 20_000))
        quantize(str(plain), tmp_path / "many", "int8")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (load(tmp_path / name) for name in ("one", "many"))
    left, right = (mixed_logits(m, _tokens(20), random.Random(0)) for m in (one, many))
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_sharded_and_single_sources_give_the_same_codes(tmp_path: Path) -> None:
    for name, size in (("one", "1GB"), ("many", "60KB")):
        write_tiny_model(tmp_path / name, "mixtral", max_shard_size=size, **wide_fields("mixtral"))
        quantize(str(tmp_path / name), tmp_path / f"{name}-int4", "int4")
    one, many = (load_file(tmp_path / f"{n}-int4" / "model.safetensors") for n in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_fingerprints_differ_between_schemes_and_plain(plain: Path, quantized: Path) -> None:
    loads = [load(plain), load(plain, quantize="int8"), load(plain, quantize="int4")]
    prints = {model.manifest.model_fingerprint for model in [*loads, load(quantized)]}
    assert len(prints) == 4
    assert load(plain, quantize="int4").manifest.model_fingerprint in prints
    assert [model.manifest.quantization for model in loads] == ["", "int8", "int4-g32"]


def test_a_tied_pair_that_differs_stays_two(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "plain", "qwen3", **wide_fields("qwen3"))
    file = tmp_path / "plain" / "model.safetensors"
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file({**tensors, "lm_head.weight": head}, file, metadata={"format": "pt"})
    quantize(str(tmp_path / "plain"), tmp_path / "int8", "int8")
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"].flip(0))
    number = load(tmp_path / "plain").manifest.num_parameters
    for model in (load(tmp_path / "int8"), load(tmp_path / "plain", quantize="int8")):
        assert model.manifest.num_parameters == number


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_either_tensor_of_a_tied_pair_is_enough(tmp_path: Path, kept: str) -> None:
    write_tiny_model(tmp_path / "plain", "qwen3", **wide_fields("qwen3"))
    reference = mixed_logits(
        load(tmp_path / "plain", quantize="int8"), _tokens(20), random.Random(0)
    )
    file = tmp_path / "plain" / "model.safetensors"
    tensors = load_file(file)
    tensors[kept] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    quantize(str(tmp_path / "plain"), tmp_path / "int8", "int8")
    for model in (load(tmp_path / "int8"), load(tmp_path / "plain", quantize="int8")):
        got = mixed_logits(model, _tokens(20), random.Random(0))
        assert all(torch.equal(got[key], value) for key, value in reference.items())


def _edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(UP), rf"lacks tensor {UP}"),
        (lambda t: t.pop(f"{UP}_zero"), rf"lacks tensor {UP}_zero"),
        (lambda t: t.update({f"{UP}_extra": torch.ones(1)}), rf"unexpected tensor {UP}_extra"),
        (lambda t: t.update({UP: t[UP][:-1].clone()}), rf"{UP} has shape \[127, 32\], the config"),
        (lambda t: t.update({UP: t[UP].float()}), rf"{UP} is stored as F32, the config wants U8"),
        (lambda t: t[f"{UP}_scale"].fill_(float("nan")), rf"{UP} can't be used: its scales"),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)}),
            r"model\.norm\.weight is stored as I8",
        ),
    ],
)
def test_load_fails_in_one_sentence_when_the_codes_do_not_fit(
    quantized: Path, change: Callable[[dict[str, torch.Tensor]], Any], sentence: str
) -> None:
    _edit_tensors(quantized, change)
    with pytest.raises(ModelLoadFailed, match=sentence):
        load(quantized)


def test_load_fails_in_one_sentence_when_the_file_is_cut_short(quantized: Path) -> None:
    file = quantized / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelLoadFailed, match=r"model\.safetensors has \d+ bytes"):
        load(quantized)


@pytest.mark.parametrize(
    ("declared", "error", "sentence"),
    [
        ({"version": 2}, UnsupportedModel, "version 2"),
        ({"bits": 3}, UnsupportedModel, "bits 3"),
        ({"group_size": 48}, UnsupportedModel, "group_size 48"),
        ({"quant_method": "gptq"}, UnsupportedModel, "gptq"),
        ({"group_size": 64}, ModelLoadFailed, "the config wants"),
        ({"bits": 8, "group_size": 0}, ModelLoadFailed, "unexpected tensor"),
    ],
)
def test_load_fails_in_one_sentence_when_the_config_declares_otherwise(
    quantized: Path, declared: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    path = quantized / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(declared)
    path.write_text(json.dumps(config))
    with pytest.raises(error, match=sentence):
        load(quantized)


def test_load_fails_by_name_when_a_weight_is_not_finite(plain: Path) -> None:
    _edit_tensors(plain, lambda tensors: tensors[UP][3].fill_(float("inf")))
    with pytest.raises(ModelLoadFailed, match=f"{UP} can't be quantized"):
        load(plain, quantize="int8")


def test_nothing_is_left_when_quantizing_fails(plain: Path, tmp_path: Path) -> None:
    _edit_tensors(plain, lambda tensors: tensors[UP][3].fill_(float("nan")))
    with pytest.raises(ModelLoadFailed, match=f"{UP} can't be quantized"):
        quantize(str(plain), tmp_path / "out", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_load_refuses_another_scheme_than_the_checkpoint_has(quantized: Path) -> None:
    assert load(quantized, quantize="int4").manifest.quantization == "int4-g32"
    with pytest.raises(InvalidRequest, match="quantized as int4-g32 already"):
        load(quantized, quantize="int8")


def test_load_refuses_a_scheme_that_it_does_not_know(plain: Path) -> None:
    with pytest.raises(InvalidRequest, match="'int3', allowed are int8, int4"):
        load(plain, quantize="int3")


def test_groups_of_another_size_are_read(plain: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(quantization.SCHEMES, "int4", Scheme(4, 64))
        quantize(str(plain), tmp_path / "g64", "int4")
    assert load(tmp_path / "g64").manifest.quantization == "int4-g64"


def test_dummy_weights_are_those_of_a_plain_dummy_load(plain: Path) -> None:
    (plain / "model.safetensors").unlink()
    one, two = (load(plain, quantize="int8", load_format="dummy") for _ in range(2))
    other = load(plain, load_format="dummy")
    left, right, wanted = (
        mixed_logits(model, _tokens(20), random.Random(0)) for model in (one, two, other)
    )
    for key, logits in left.items():
        assert torch.equal(logits, right[key])
        torch.testing.assert_close(logits, wanted[key], rtol=0, atol=0.1 * float(logits.std()))


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "infermesh.cli", "quantize", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_command_writes_what_loads_and_refuses_a_folder_in_use(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = _command(str(plain), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "int8" in done.stdout
    assert (out / "tokenizer.json").read_bytes() == (plain / "tokenizer.json").read_bytes()
    assert load(out).manifest.quantization == "int8"
    again = _command(str(plain), "--out", str(out))
    assert again.returncode == 1
    assert again.stderr.strip() == f"error: {out} is there already and not an empty folder"


def test_command_refuses_what_is_quantized_already(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="quantized as int4-g32 already"):
        quantize(str(quantized), tmp_path / "again", "int8")
    shutil.rmtree(quantized)
    with pytest.raises(ModelLoadFailed, match="is not a directory"):
        quantize(str(quantized), tmp_path / "again", "int8")


def test_load_computes_in_bfloat16_between_the_matrices_when_asked_to(plain: Path) -> None:
    exact = load(plain, kernels="off", quantize="int8")
    rounded = load(plain, kernels="off", quantize="int8", dtype="bfloat16")
    assert rounded.manifest.dtype == "bfloat16"
    left, right = (mixed_logits(m, _tokens(20), random.Random(0)) for m in (exact, rounded))
    for key, logits in left.items():
        assert right[key].dtype is torch.bfloat16
        spread = float(logits.std())
        torch.testing.assert_close(right[key].float(), logits, rtol=0, atol=0.2 * spread)


def test_loader_refuses_codes_on_another_device_than_a_cpu(plain: Path) -> None:
    loader = TorchLoader("cpu", 1, 1)
    loader.device = torch.device("cuda", 0)
    with pytest.raises(InvalidRequest, match="quantize is for CPUs"):
        loader.choose_dtype(LoadSpec(str(plain)), read_model_files(plain), None, Scheme(8))


def test_loader_refuses_a_torch_without_the_kernels(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_layers, "_ENGINE", "nowhere")
    with pytest.raises(InvalidRequest, match="x86"):
        load(plain, kernels="off", quantize="int8")


def test_loader_refuses_codes_in_deterministic_mode(plain: Path) -> None:
    spec = LoadSpec(str(plain), quantize="int8", num_blocks=4)
    config = ShardConfig(device="cpu", num_threads=1, deterministic=True)
    with pytest.raises(InvalidRequest, match="deterministic mode is not proven with quantized"):
        load_model(spec, config, lambda progress: None)
