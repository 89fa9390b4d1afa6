"""Which models are served, and the refusal by name of all others: nothing is served wrong.

Reads config.json alone, before any heavy import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infermesh.errors import UnsupportedModel

# Each has a parity test against transformers in tests/unit/shard/test_parity.py.
MODEL_TYPES = ("gemma2", "llama", "qwen2", "qwen3")
# Their tables depend on the model alone; dynamic and longrope choose theirs from the longest
# position in the batch, so that one request would change the others.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def check_supported(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedModel, naming what can't be served."""
    model_type = config.get("model_type")
    # Before the type: an unknown encoder-decoder is better told what it is.
    if config.get("is_encoder_decoder"):
        raise UnsupportedModel(f"model_type {model_type!r} is an encoder-decoder model")
    if model_type not in MODEL_TYPES:
        raise UnsupportedModel(
            f"model_type {model_type!r} is not supported; supported are {', '.join(MODEL_TYPES)}"
        )
    architectures = config.get("architectures") or []
    if architectures and not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise UnsupportedModel(f"{architectures[0]} is not a causal language model")
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        raise UnsupportedModel(f"the checkpoint is quantized ({method}), which is not supported")
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        raise UnsupportedModel(f"this {model_type} model attends in both directions")
    if "AutoModelForCausalLM" in (config.get("auto_map") or {}):
        raise UnsupportedModel(f"this {model_type} model needs code of its own (auto_map)")
    for rope_type in _rope_types(config):
        if rope_type not in ROPE_TYPES:
            raise UnsupportedModel(
                f"rope type {rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
            )


def _rope_types(config: Mapping[str, Any]) -> list[str]:
    """Of `rope_parameters`, or `rope_scaling` in older configs; flat or one per layer type."""
    groups: list[Mapping[str, Any]] = []
    for key in ("rope_parameters", "rope_scaling"):
        parameters = config.get(key)
        if isinstance(parameters, dict):
            nested = [value for value in parameters.values() if isinstance(value, dict)]
            groups.extend(nested or [parameters])
    return [str(group.get("rope_type") or group.get("type") or "default") for group in groups]
