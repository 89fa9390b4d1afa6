"""A model without its weights: transformers' modules on the meta device, what they share, and the
buffers that no checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

from infermesh.errors import MeshError, ModelLoadFailed
from services.shard.forward import ATTENTION_NAME, register
from services.shard.model_files import ModelFiles


def meta_model(files: ModelFiles, dtype: torch.dtype) -> Any:
    """The model without memory. Raises ModelLoadFailed."""
    register()
    try:
        config = transformers.AutoConfig.from_pretrained(files.directory, local_files_only=True)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation=ATTENTION_NAME, dtype=dtype
            )
    except MeshError:
        raise
    except Exception as exc:  # a wrong field raises anything, from anywhere in the model code
        path = files.directory / "config.json"
        raise ModelLoadFailed(f"{path} can't be used: {exc}") from exc


def tied_parameters(model: Any) -> Mapping[str, str]:
    """Parameter → the parameter that it shares."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    return dict(model._tied_weights_keys or {})  # transformers 5: parameter → source


def fill_buffers(model: Any, device: torch.device) -> None:
    """Buffers that no checkpoint holds, computed as the modules themselves do.

    Raises ModelLoadFailed for one that is unknown.
    """
    for module in model.modules():
        names = [name for name, value in module.named_buffers(recurse=False) if value.is_meta]
        if not names:
            continue
        if "RotaryEmbedding" in type(module).__name__:
            fresh = type(module)(model.config)
            values = {name: getattr(fresh, name) for name in names}
        elif names == ["embed_scale"]:
            values = {"embed_scale": torch.tensor(model.config.hidden_size**0.5)}
        else:
            raise ModelLoadFailed(f"{type(module).__name__} has unknown buffers {names}")
        for name, value in values.items():
            module.register_buffer(name, value.to(device), persistent=False)


def check_filled(model: nn.Module) -> None:
    """Raises ModelLoadFailed for what is still without memory."""
    for name, value in model.named_parameters():
        if value.is_meta:
            raise ModelLoadFailed(f"parameter {name} was given no weights")


def num_parameters(model: nn.Module) -> int:
    """Distinct parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
