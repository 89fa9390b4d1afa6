"""Tiny random models in the Hugging Face layout, built on the spot in under a second, offline.

Owns the weights' scale and the tokenizer (byte-level BPE, ChatML template). It asserts
nothing and knows no service.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.architectures import (
    ARCHITECTURES,
    BOS_ID,
    EOS_ID,
    IM_END_ID,
    IM_START_ID,
    VOCAB_SIZE,
    tiny_fields,
)

__all__ = [
    "ARCHITECTURES",
    "BOS_ID",
    "EOS_ID",
    "IM_END_ID",
    "IM_START_ID",
    "VOCAB_SIZE",
    "build_tokenizer",
    "tiny_config",
    "tiny_model",
    "write_tiny_model",
    "write_tokenizer",
]

BOS_TOKEN, EOS_TOKEN, IM_START, IM_END = "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (BOS_TOKEN, EOS_TOKEN, IM_START, IM_END)

CHATML_TEMPLATE = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)

_CORPUS = (
    "The mesh answers a question, one token after another, and nothing is lost on the way.",
    "A shard holds the weights and the blocks; a scheduler plans the steps; a gateway speaks.",
    "What is the capital of France? Paris. What is the capital of Italy? Rome.",
    "user assistant system hello there thank you please tell me about the weather today",
    "one two three four five six seven eight nine ten 0 1 2 3 4 5 6 7 8 9",
)


def tiny_config(model_type: str = "llama", **overrides: Any) -> Any:
    """The transformers config of a tiny `model_type`; `overrides` replace single fields."""
    return AutoConfig.for_model(model_type, **tiny_fields(model_type, overrides))


def tiny_model(model_type: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 model in eval mode whose logits are spread enough for greedy output to be clear."""
    config = tiny_config(model_type, **overrides)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(0.0, 0.2, generator=generator)
            elif parameter.dim() == 1 or "norm" in name:  # around what they were initialised to
                parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.1, generator=generator))
            else:
                parameter.normal_(0.0, _scale(name, parameter), generator=generator)
    return model.eval()


def _scale(name: str, parameter: torch.Tensor) -> float:
    """Keeps activations of order one from layer to layer."""
    if any(part in name for part in ("embed", "lm_head", "wte", "wpe")):
        return 1.0
    return float(parameter.shape[-1] ** -0.5)


def build_tokenizer(vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Byte-level BPE over a few sentences; any text round-trips. Fewer tokens than `vocab_size`
    are possible: the rest of the model's vocabulary is then padding, as in real models."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def write_tokenizer(directory: Path, *, chat_template: str | None = CHATML_TEMPLATE) -> None:
    """tokenizer.json and tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(directory / "tokenizer.json"))
    fields: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TOKEN,
        "eos_token": IM_END,
        "pad_token": EOS_TOKEN,
        "add_bos_token": False,
    }
    if chat_template is not None:
        fields["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(fields, indent=2))


def write_tiny_model(
    directory: Path,
    model_type: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    chat_template: str | None = CHATML_TEMPLATE,
    **overrides: Any,
) -> Path:
    """A whole model directory: config, safetensors (sharded below `max_shard_size`), generation
    config and tokenizer. Returns `directory`."""
    model = tiny_model(model_type, seed=seed, **overrides).to(dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    write_tokenizer(directory, chat_template=chat_template)
    return directory
