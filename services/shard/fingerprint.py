"""The model's fingerprint: replicas with equal ones may continue each other's streams.

Hashing runs in a thread of its own beside the import of torch and the reading of the weights.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path

from infermesh.errors import ModelLoadFailed
from services.shard.packed_cache.hashes import Identity, RememberedHashes, identity

_SHA256 = re.compile(r"[0-9a-f]{64}")


class WeightHashes:
    """SHA-256 of each weight file, in the background from the start."""

    def __init__(self, files: Sequence[Path], remembered: RememberedHashes | None = None) -> None:
        self._files, self._remembered = files, remembered
        self._hashes: list[tuple[str, str]] = []
        self._identities: list[Identity] = []
        self._error: OSError | None = None
        self._cancelled = threading.Event()
        # A daemon: the process may end while a large file is being hashed.
        self._thread = threading.Thread(target=self._run, name="weight-hash", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """Nobody wants the rest."""
        self._cancelled.set()

    def wait(self) -> list[tuple[str, str]]:
        """(file name, hash) of every file.

        Raises ModelLoadFailed where one can't be read.
        """
        self._thread.join()
        if self._error is not None:
            raise ModelLoadFailed(f"{self._error.filename} can't be read") from self._error
        return self._hashes

    def are_current(self) -> bool:
        """Whether the files are still what was hashed, so that what was read since is of them."""
        self._thread.join()
        try:
            return self._identities == [identity(file) for file in self._files]
        except OSError:
            return False

    def _run(self) -> None:
        try:
            for file in self._files:
                if self._cancelled.is_set():
                    return
                self._identities.append(identity(file))
                self._hashes.append((file.name, self._sha256(file)))
        except OSError as exc:
            self._error = exc

    def _sha256(self, file: Path) -> str:
        if self._remembered is None:
            return file_sha256(file)
        return self._remembered.sha256(file, file_sha256)


def file_sha256(file: Path) -> str:
    """Of the content; the hub's cache names its large files by just that."""
    target = file.resolve()
    if target.parent.name == "blobs" and _SHA256.fullmatch(target.name):
        return target.name
    with target.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(
    weights: Sequence[tuple[str, str]],
    config: bytes,
    dtype: str,
    tokenizer: bytes,
    eos_token_ids: Sequence[int],
    arithmetic: str = "",
    quantization: str = "",
    kv_cache_dtype: str = "",
) -> str:
    """One hash over everything that decides which tokens come out, and where they end.

    Args:
        arithmetic: how it is computed, in deterministic mode, where equals must agree in each bit.
    """
    parts: dict[str, object] = {
        "weights": list(weights),
        "config": digest(config),
        "dtype": dtype,
        "quantization": quantization,
        "kv_cache_dtype": kv_cache_dtype,
        "tokenizer": digest(tokenizer),
        "eos": sorted(eos_token_ids),
    }
    if arithmetic:
        parts["deterministic"] = arithmetic
    return digest(json.dumps(parts, sort_keys=True).encode())


def digest(data: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(data).hexdigest()
