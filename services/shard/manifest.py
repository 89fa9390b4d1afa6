"""What gateway and scheduler are told of a loaded model."""

from __future__ import annotations

import time

from services.shard.domain import LoadSpec, Manifest
from services.shard.model_files import ModelFiles
from services.shard.source import Source


def make_manifest(
    spec: LoadSpec,
    source: Source,
    files: ModelFiles,
    *,
    fingerprint: str,
    dtype: str,
    max_model_len: int,
    num_parameters: int,
    weight_bytes: int,
    rope_switch_len: int = 0,
    quantization: str = "",
) -> Manifest:
    """The manifest of a model that was loaded just now."""
    return Manifest(
        model_id=spec.model_id or source.default_model_id,
        model_fingerprint=fingerprint,
        architecture=str(files.config.get("model_type", "")),
        dtype=dtype,
        quantization=quantization,
        max_model_len=max_model_len,
        vocab_size=files.vocab_size,
        eos_token_ids=files.eos_token_ids,
        bos_token_id=files.token_id("bos_token_id"),
        pad_token_id=files.token_id("pad_token_id"),
        chat_template=files.chat_template,
        generation_config_json=files.generation_config_json,
        tokenizer_config_json=files.tokenizer_config_json,
        num_parameters=num_parameters,
        weight_bytes=weight_bytes,
        source=source.name,
        created_unix_s=int(time.time()),
        # No sequence gets there where the context is cut to less.
        rope_switch_len=rope_switch_len if rope_switch_len < max_model_len else 0,
    )
