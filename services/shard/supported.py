"""Which models are served, and the refusal by name of all others: nothing is served wrong.

Reads config.json alone, before any heavy import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infermesh.errors import UnsupportedModel
from services.shard.quantization import stored_scheme


@dataclass(frozen=True, slots=True)
class Architecture:
    """One supported `model_type`, the transformers class that computes it, and who publishes it."""

    model_type: str
    class_name: str
    families: str


# Each has a parity test against transformers in tests/unit/shard/test_parity.py; README.md's table
# is printed from this one and those tests (`make supported-table`).
ARCHITECTURES = (
    Architecture("cohere", "CohereForCausalLM", "Command R, Aya"),
    Architecture("gemma2", "Gemma2ForCausalLM", "Gemma 2"),
    Architecture("gemma3_text", "Gemma3ForCausalLM", "Gemma 3, text only (270M, 1B)"),
    Architecture("glm", "GlmForCausalLM", "GLM-4 9B, GLM-Edge"),
    Architecture("gpt2", "GPT2LMHeadModel", "GPT-2, DistilGPT-2"),
    Architecture("granite", "GraniteForCausalLM", "Granite 3"),
    Architecture("llama", "LlamaForCausalLM", "Llama 2 and 3, SmolLM, TinyLlama, Yi"),
    Architecture("mistral", "MistralForCausalLM", "Mistral 7B, Nemo, Small"),
    Architecture("mixtral", "MixtralForCausalLM", "Mixtral 8x7B, 8x22B"),
    Architecture("olmo2", "Olmo2ForCausalLM", "OLMo 2"),
    Architecture("phi3", "Phi3ForCausalLM", "Phi-3 mini and medium, Phi-3.5 mini, Phi-4"),
    Architecture("qwen2", "Qwen2ForCausalLM", "Qwen 2, Qwen 2.5, QwQ"),
    Architecture("qwen3", "Qwen3ForCausalLM", "Qwen 3"),
    Architecture("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen 3 MoE (30B-A3B, 235B-A22B)"),
    Architecture("starcoder2", "Starcoder2ForCausalLM", "StarCoder 2"),
)
_BY_TYPE = {architecture.model_type: architecture for architecture in ARCHITECTURES}
MODEL_TYPES = tuple(_BY_TYPE)
# Their tables depend on the model alone, but for two: dynamic ones change past
# max_position_embeddings, and no sequence is longer; longrope has two, see rope.py.
ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")
# What a model_type must not ask for: its model code would ignore it, or attend otherwise.
_UNSERVED = (
    ("use_bidirectional_attention", "attends in both directions"),
    ("add_cross_attention", "has cross-attention"),
)


def check_supported(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedModel, naming what can't be served."""
    model_type = config.get("model_type")
    # Before the type: an unknown encoder-decoder is better told what it is.
    if config.get("is_encoder_decoder"):
        raise UnsupportedModel(f"model_type {model_type!r} is an encoder-decoder model")
    architecture = _BY_TYPE.get(str(model_type))
    if architecture is None:
        raise UnsupportedModel(
            f"model_type {model_type!r} is not supported; supported are {', '.join(MODEL_TYPES)}"
        )
    _check_class(config, architecture)
    stored_scheme(config)
    for field, what in _UNSERVED:
        if config.get(field):
            raise UnsupportedModel(f"this {model_type} model {what} ({field})")
    if config.get("is_causal") is False:
        raise UnsupportedModel(f"this {model_type} model attends in both directions (is_causal)")
    if model_type == "mistral" and config.get("layer_types"):
        raise UnsupportedModel("this mistral model alternates its attention (layer_types)")
    for rope_type in _rope_types(config):
        if rope_type not in ROPE_TYPES:
            raise UnsupportedModel(
                f"rope type {rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
            )


def _check_class(config: Mapping[str, Any], architecture: Architecture) -> None:
    """Another class than transformers' own computes something else from the same weights."""
    wanted = architecture.class_name
    named = [str(name) for name in config.get("architectures") or []]
    if named and wanted not in named:
        raise UnsupportedModel(
            f"{named[0]} is not supported; a {architecture.model_type} model must be a {wanted}"
        )
    own_code = (config.get("auto_map") or {}).get("AutoModelForCausalLM")
    # Phi-3 and others still carry the code that transformers took in since.
    if own_code and str(own_code).rpartition(".")[2] != wanted:
        raise UnsupportedModel(
            f"this {architecture.model_type} model needs code of its own (auto_map: {own_code})"
        )


def _rope_types(config: Mapping[str, Any]) -> list[str]:
    """Of `rope_parameters`, or `rope_scaling` in older configs; flat or one per layer type."""
    groups: list[Mapping[str, Any]] = []
    for key in ("rope_parameters", "rope_scaling"):
        parameters = config.get(key)
        if isinstance(parameters, dict):
            nested = [value for value in parameters.values() if isinstance(value, dict)]
            groups.extend(nested or [parameters])
    types = [str(group.get("rope_type") or group.get("type") or "default") for group in groups]
    # Phi-3 was published with names of its own for it.
    is_phi3 = config.get("model_type") == "phi3"
    return ["longrope" if is_phi3 and name in ("su", "yarn") else name for name in types]
