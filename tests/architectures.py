"""What is tested of each supported architecture: a tiny config that makes it itself, and variants.

The parity tests run all of it, and `tests/supported_table.py` prints it for README.md. Owns no
weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCAB_SIZE = 384
BOS_ID, EOS_ID, IM_START_ID, IM_END_ID = range(4)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    # Deliberately no power of two.
    "head_dim": 10,
    "max_position_embeddings": 512,
    "bos_token_id": BOS_ID,
    "eos_token_id": IM_END_ID,
    "pad_token_id": EOS_ID,
}
# For those whose head_dim is always hidden_size / num_attention_heads.
_UNDIVIDED = {"hidden_size": 60, "head_dim": None}
# None takes the shape's field away.
_OWN: dict[str, dict[str, Any]] = {
    "cohere": {**_UNDIVIDED, "logit_scale": 0.5},
    "gemma2": {
        "tie_word_embeddings": True,
        "num_hidden_layers": 4,
        "sliding_window": 24,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma3_text": {
        "num_hidden_layers": 4,
        "sliding_window": 11,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 12,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
        },
    },
    "glm": {"head_dim": 12},
    "gpt2": {**_UNDIVIDED, "num_key_value_heads": None, "intermediate_size": None},
    "granite": {
        **_UNDIVIDED,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 0.5,
    },
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 13},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 15},
    "olmo2": _UNDIVIDED,
    "phi3": {**_UNDIVIDED, "sliding_window": 17},
    "qwen2": {**_UNDIVIDED, "tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "starcoder2": {**_UNDIVIDED, "sliding_window": 19},
}
ARCHITECTURES = tuple(_OWN)

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4],
    "long_factor": [1.5, 2.5, 4.0, 8.0, 16.0],
    "original_max_position_embeddings": 40,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}


@dataclass(frozen=True, slots=True)
class Variant:
    """One tiny model: an architecture, and what differs from its plain shape."""

    model_type: str
    # For a person; empty for the plain shape.
    name: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.model_type} {self.name}".strip()


def _rope(model_type: str, parameters: dict[str, Any]) -> Variant:
    name = parameters["rope_type"]
    name = name if name.endswith("rope") else f"{name} rope"
    return Variant(model_type, name, {"rope_parameters": dict(parameters)})


_VARIANTS = (
    _rope("llama", _LLAMA3),
    _rope("llama", _LINEAR),
    _rope("llama", _DYNAMIC),
    Variant("llama", "biases", {"attention_bias": True, "mlp_bias": True}),
    Variant("llama", "one KV head for all", {"num_key_value_heads": 1, "head_dim": 14}),
    Variant("llama", "a KV head for each", {"num_key_value_heads": 6}),
    _rope("mistral", _YARN),
    Variant(
        "phi3",
        "longrope with short and long sequences in one batch",
        {
            "rope_parameters": _LONGROPE,
            "original_max_position_embeddings": 40,
            "sliding_window": None,
        },
    ),
    _rope("llama", _LONGROPE),
    Variant("mistral", "no window", {"sliding_window": None}),
    _rope("qwen2", _YARN),
    Variant(
        "qwen2",
        "windows in some layers",
        {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1},
    ),
    _rope("qwen3", _YARN),
    _rope("qwen3_moe", _YARN),
    Variant("qwen3_moe", "window", {"use_sliding_window": True, "sliding_window": 13}),
    Variant("gemma2", "no caps", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    Variant("gemma3_text", "final cap", {"final_logit_softcapping": 8.0}),
    _rope("olmo2", _YARN),
    _rope("granite", _LLAMA3),
    Variant("granite", "biases", {"attention_bias": True, "mlp_bias": True}),
    Variant("starcoder2", "no biases", {"use_bias": False, "sliding_window": None}),
    Variant("cohere", "query and key norms", {"use_qk_norm": True, "attention_bias": True}),
    _rope("cohere", _DYNAMIC),
    Variant("glm", "whole heads rotated", {"partial_rotary_factor": 1.0}),
    Variant("gpt2", "layer-wise scaling", {"scale_attn_by_inverse_layer_idx": True}),
    Variant("gpt2", "unscaled attention", {"scale_attn_weights": False, "n_inner": 72}),
    Variant("mixtral", "one expert per token", {"num_experts_per_tok": 1, "sliding_window": None}),
)
VARIANTS = {
    str(variant): variant for variant in (*(Variant(name) for name in ARCHITECTURES), *_VARIANTS)
}


def tiny_fields(model_type: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a tiny config of `model_type`; `overrides` replace single ones."""
    own = _OWN[model_type]
    shape = {name: value for name, value in _SHAPE.items() if own.get(name, value) is not None}
    return {**shape, **{k: v for k, v in own.items() if v is not None}, **overrides}
