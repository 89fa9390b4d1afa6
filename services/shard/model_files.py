"""The small files of a model directory: config, tokenizer, chat template, generation config.

No weights, no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infermesh.errors import ModelLoadFailed

TOKENIZER_NAME = "tokenizer.json"
# Any of these lets transformers build a tokenizer where there is no tokenizer.json.
_OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What was read, as it stands in the files."""

    directory: Path
    config: Mapping[str, Any]
    config_bytes: bytes
    generation_config_json: str
    tokenizer_config_json: str
    tokenizer: bytes
    chat_template: str

    @property
    def generation_config(self) -> Mapping[str, Any]:
        text = self.generation_config_json
        return _object(text, self.directory / "generation_config.json") if text else {}

    @property
    def max_model_len(self) -> int:
        """Positions that the model was made for."""
        # n_positions: GPT-2, whose learned table has a row for each
        value = self.config.get("max_position_embeddings", self.config.get("n_positions"))
        if not isinstance(value, int) or value < 1:
            raise self.bad_config("max_position_embeddings", value)
        return value

    @property
    def vocab_size(self) -> int:
        value = self.config.get("vocab_size")
        if not isinstance(value, int) or value < 1:
            raise self.bad_config("vocab_size", value)
        return value

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """From the generation config, else from the config; none where neither says."""
        for fields in (self.generation_config, self.config):
            value = fields.get("eos_token_id")
            if isinstance(value, int):
                return (value,)
            if isinstance(value, list) and value:
                return tuple(int(token) for token in value)
        return ()

    def token_id(self, name: str) -> int | None:
        """`bos_token_id` or `pad_token_id`, from the same places."""
        for fields in (self.generation_config, self.config):
            value = fields.get(name)
            if isinstance(value, int):
                return value
        return None

    def bad_config(self, name: str, value: object) -> ModelLoadFailed:
        return ModelLoadFailed(f"{self.directory / 'config.json'} has {name} {value!r}")


def read_model_files(directory: Path) -> ModelFiles:
    """Raises ModelLoadFailed naming the file that is missing or torn."""
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise ModelLoadFailed(f"{directory} has no config.json")
    config_bytes = _bytes(config_path)
    tokenizer_config = _text(directory / "tokenizer_config.json")
    if tokenizer_config:
        _object(tokenizer_config, directory / "tokenizer_config.json")
    return ModelFiles(
        directory=directory,
        config=_object(config_bytes, config_path),
        config_bytes=config_bytes,
        generation_config_json=_text(directory / "generation_config.json"),
        tokenizer_config_json=tokenizer_config,
        tokenizer=_tokenizer(directory),
        chat_template=_chat_template(directory, tokenizer_config),
    )


def _tokenizer(directory: Path) -> bytes:
    path = directory / TOKENIZER_NAME
    if path.is_file():
        content = _bytes(path)
        _object(content, path)
        return content
    if not any(True for pattern in _OTHER_TOKENIZERS for _ in directory.glob(pattern)):
        raise ModelLoadFailed(f"{directory} has no tokenizer: no {TOKENIZER_NAME}")
    return _converted_tokenizer(directory)


def _converted_tokenizer(directory: Path) -> bytes:
    try:
        from transformers import AutoTokenizer

        backend = AutoTokenizer.from_pretrained(directory, local_files_only=True).backend_tokenizer
        text: str = backend.to_str()
    except Exception as exc:  # conversions raise whatever their formats' libraries raise
        raise ModelLoadFailed(
            f"{directory} has no {TOKENIZER_NAME}, and its tokenizer can't be converted to one: "
            f"{type(exc).__name__}"
        ) from exc
    return text.encode()


def _chat_template(directory: Path, tokenizer_config: str) -> str:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return _text(path)
    value = json.loads(tokenizer_config).get("chat_template") if tokenizer_config else None
    if isinstance(value, list):  # several named templates
        by_name = {entry.get("name"): entry.get("template") for entry in value}
        value = by_name.get("default")
    return value if isinstance(value, str) else ""


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ModelLoadFailed(f"{path} can't be read: {exc.strerror}") from exc


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return _bytes(path).decode()
    except UnicodeDecodeError as exc:
        raise ModelLoadFailed(f"{path} is not UTF-8 text") from exc


def _object(content: str | bytes, path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as exc:
        raise ModelLoadFailed(f"{path} is not valid JSON: it is torn or empty") from exc
    if not isinstance(value, dict):
        raise ModelLoadFailed(f"{path} is not a JSON object")
    return value
