"""What config.json files say as they are published: accepted, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from infermesh.errors import UnsupportedModel
from services.shard.supported import ARCHITECTURES, check_supported

_PHI3_CODE = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
}
_FACTORS = {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48}
# The fields that decide, as the named repositories have them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Phi-3-mini-4k-instruct": {
        "architectures": ["Phi3ForCausalLM"],
        "auto_map": _PHI3_CODE,
        "model_type": "phi3",
        "rope_scaling": None,
        "sliding_window": 2047,
    },
    "Phi-3-mini-128k-instruct": {
        "architectures": ["Phi3ForCausalLM"],
        "auto_map": _PHI3_CODE,
        "model_type": "phi3",
        "original_max_position_embeddings": 4096,
        "rope_scaling": {**_FACTORS, "type": "longrope"},
    },
    "Phi-3-mini-128k-instruct, first revision": {
        "architectures": ["Phi3ForCausalLM"],
        "auto_map": _PHI3_CODE,
        "model_type": "phi3",
        "rope_scaling": {**_FACTORS, "type": "su"},
    },
    "gemma-3-1b-it": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "sliding_window_pattern": 6,
    },
    "Mixtral-8x7B-Instruct-v0.1": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "sliding_window": None,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "rope_scaling": None,
    },
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
    "Llama-3.2-1B-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_scaling": {"factor": 32.0, "rope_type": "llama3"},
    },
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gemma-3-4b-it": (
        {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"},
        "model_type 'gemma3' is not supported",
    ),
    "gpt-oss-20b": ({"model_type": "gpt_oss"}, "gpt_oss"),
    "DeepSeek-V3": ({"model_type": "deepseek_v3"}, "deepseek_v3"),
    "Llama-4-Scout": ({"model_type": "llama4"}, "llama4"),
    "mamba2-2.7b": ({"model_type": "mamba2"}, "mamba2"),
    "Qwen2.5-7B-Instruct-AWQ": (
        {"model_type": "qwen2", "quantization_config": {"quant_method": "awq"}},
        r"quantized \(awq\)",
    ),
    "another class for a known type": (
        {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"},
        "a llama model must be a LlamaForCausalLM",
    ),
    "another class among several named": (
        {
            "architectures": ["MistralForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "modeling.MistralWithMoreForCausalLM"},
            "model_type": "mistral",
        },
        "needs code of its own",
    ),
    "a scaling that its model code does not know": (
        {"model_type": "llama", "rope_scaling": {"type": "su"}},
        "rope type 'su'",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_is_accepted_as_it_is_published(name: str) -> None:
    check_supported(PUBLISHED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_config_is_refused_by_name_when_it_would_be_served_wrong(name: str) -> None:
    config, said = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=said):
        check_supported(config)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.model_type)
def test_class_is_the_one_that_transformers_has_for_the_type(architecture: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture.model_type] == architecture.class_name
