"""Under which name packed weights are kept: it changes with whatever may change their bytes.

No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

_SHARD = Path(__file__).parents[1]


@cache
def sources_digest() -> str:
    """Of this service's own code. Which of it shapes the bytes nobody has to remember then: how
    weights are read, quantized, grouped and packed, and how a file of them is read."""
    digest = hashlib.sha256()
    for path in sorted(_SHARD.rglob("*.py")):
        digest.update(f"{path.relative_to(_SHARD)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def _library_versions() -> Mapping[str, str]:
    return {name: version(name) for name in ("torch", "transformers")}


@dataclass(frozen=True, slots=True)
class PackedKey:
    """What packed weights are made from.

    Attributes:
        weights: (file name, SHA-256) of each file of the checkpoint.
        config: SHA-256 of its config.json.
        dtype, quantization: what it is served in.
        kernels: the library's name, which has its sources, flags and instruction set in it.
        sources, libraries: the code that packs.
    """

    weights: Sequence[tuple[str, str]]
    config: str
    dtype: str
    quantization: str
    kernels: str
    sources: str = field(default_factory=sources_digest)
    libraries: Mapping[str, str] = field(default_factory=_library_versions)

    def __str__(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:40]
