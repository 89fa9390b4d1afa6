"""Tiny quantized models, their weights as an oracle reads them, and logits in mixed steps."""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

from infermesh.config import ShardConfig
from services.shard.batch import pack
from services.shard.domain import LoadSpec, Sampling
from services.shard.engine import LoadedModel
from services.shard.loading import load_model
from tests.architectures import VARIANTS
from tests.unit.shard.rows import active_row

BLOCK = 4
# Widths that int4's kernel takes: multiples of the group.
WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def wide_fields(variant: str) -> dict[str, Any]:
    """The variant's fields in a shape of which most matrices can have 4 bits."""
    model_type, own = VARIANTS[variant].model_type, dict(VARIANTS[variant].fields)
    if model_type == "gpt2":
        return {"hidden_size": 64, "num_attention_heads": 4, **own}
    rope = own.get("rope_parameters", {})
    if "long_factor" in rope:  # one per pair of a head's 16
        factors = {
            name: rope[name][:1] * 3 + rope[name] for name in ("long_factor", "short_factor")
        }
        own["rope_parameters"] = {**rope, **factors}
    if own.get("num_key_value_heads") == 6:
        own["num_key_value_heads"] = 4  # one for each
    moe = {"moe_intermediate_size": 32} if model_type == "qwen3_moe" else {}
    return {**WIDE, **moe, **own}


def load(directory: Path, kernels: str = "auto", **fields: Any) -> LoadedModel:
    """A shard's model; steps of one thread, so that sums are in one order."""
    chosen = {"block_size": BLOCK, "num_blocks": 120, "max_num_seqs": 8, **fields}
    spec = LoadSpec(str(directory), max_batch_tokens=512, **chosen)
    return load_model(
        spec, ShardConfig(device="cpu", num_threads=1, kernels=kernels), lambda progress: None
    )


def dequantized(directory: Path) -> dict[str, torch.Tensor]:
    """What a quantized checkpoint's codes mean, in float32, by the format's definition alone:
    code × scale, or (code - 8) × scale + zero per group."""
    stored = load_file(directory / "model.safetensors")
    found = {}
    for name, codes in stored.items():
        scale, zero = stored.get(f"{name}_scale"), stored.get(f"{name}_zero")
        if name.endswith(("_scale", "_zero")):
            continue
        if scale is None:
            found[name] = codes.float()
        elif zero is None:
            found[name] = codes.float() * scale[:, None]
        else:
            group = json.loads((directory / "config.json").read_text())
            size = group["quantization_config"]["group_size"]
            both = torch.empty(len(codes), 2 * codes.shape[1])
            both[:, 0::2], both[:, 1::2] = codes & 15, codes >> 4
            wide = [part.float().repeat_interleave(size, dim=1) for part in (scale, zero)]
            found[name] = (both - 8) * wide[0] + wide[1]
    return found


def oracle(plain: Path, quantized: Path, *, rounded: Collection[str] = ()) -> Any:
    """transformers' own model with the values that the quantized checkpoint means.

    Args:
        rounded: of products with codes of these schemes the input is rounded to bytes.
    """
    model = AutoModelForCausalLM.from_pretrained(
        plain, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    values = dequantized(quantized)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in values.items():
        wanted = parameters[name]
        # GPT-2's matrices are the other way round
        is_conv = name.startswith("transformer.h.") and value.dim() == 2
        with torch.no_grad():
            wanted.copy_(value.t() if is_conv else value.view(wanted.shape))
    head = model.get_output_embeddings()
    for name in _matrices_of(quantized, rounded):
        module = model.get_submodule(name.rpartition(".")[0])
        if not name.endswith(".weight"):
            _round_in_experts(module)
        elif not isinstance(module, torch.nn.Embedding):
            module.register_forward_pre_hook(lambda _, args: (to_bytes(args[0]), *args[1:]))
        elif head.weight is module.weight:  # looked up, and multiplied by as the head
            head.register_forward_pre_hook(lambda _, args: (to_bytes(args[0]), *args[1:]))
    return model


def _matrices_of(quantized: Path, chosen: Collection[str]) -> list[str]:
    """Names of the matrices whose codes are of one of these schemes."""
    stored = load_file(quantized / "model.safetensors")
    names = [name.removesuffix("_scale") for name in stored if name.endswith("_scale")]
    scheme = {name: "int4" if f"{name}_zero" in stored else "int8" for name in names}
    return [name for name in names if scheme[name] in chosen]


def _round_in_experts(module: Any) -> None:
    """All products of a module round what they are given; more than once changes nothing more."""
    forward, linear = module.forward, torch.nn.functional.linear

    def multiply(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return linear(to_bytes(x), *rest)

    def patched(*args: Any, **kwargs: Any) -> Any:
        with patch("torch.nn.functional.linear", multiply):
            return forward(*args, **kwargs)

    module.forward = patched


def to_bytes(x: torch.Tensor) -> torch.Tensor:
    """[..., columns] → the same, each 32 columns in multiples of their largest value / 127."""
    groups = pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    units = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (groups / units).round().mul(units).flatten(-2)[..., : x.shape[-1]]


def mixed_logits(
    loaded: Any, sequences: list[list[int]], rng: random.Random
) -> dict[tuple[int, int], torch.Tensor]:
    """(sequence, position) → logits after it, from steps that mix chunks and decodes at random."""
    blocks = rng.sample(range(120), 120)
    tables = np.array(blocks[: len(sequences) * 20]).reshape(len(sequences), 20)
    done, found = [0] * len(sequences), {}
    switch_len = loaded.manifest.rope_switch_len
    while any(done[i] < len(tokens) for i, tokens in enumerate(sequences)):
        rows = []
        for i, tokens in enumerate(sequences):
            left = len(tokens) - done[i]
            if left == 0 or rng.random() < 0.2:
                continue
            size = 1 if rng.random() < 0.7 else min(left, rng.randint(1, 30))
            row = active_row(
                Sampling(),
                slot=i,
                start=done[i],
                token_ids=tokens[done[i] : done[i] + size],
                block_ids=[0],
                long_rope=0 < switch_len < len(tokens),
            )
            rows.append(row)
        if not rows:
            continue
        batch = pack(rows, tables, BLOCK)
        with torch.inference_mode():
            logits = loaded.engine._forward.logits(batch)
        for place, packed in enumerate(batch.sampled):
            row = rows[batch.order[packed]]
            found[row.sequence.new.slot, row.context_len - 1] = logits[place]
        for row in rows:
            done[row.sequence.new.slot] = row.context_len
    return found
