"""Which quantizations are served: their names, what a checkpoint says of its own, what is refused.

Names and numbers only; imports no torch. The arithmetic is `row_codes.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infermesh.errors import InvalidRequest, UnsupportedModel

# In a checkpoint's config.json: quantization_config.quant_method.
METHOD = "infermesh"
FORMAT_VERSION = 1
# Columns that share a scale; what torch's int4 kernel takes.
GROUP_SIZES = (32, 64, 128, 256)
DEFAULT_GROUP_SIZE = 32


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are stored: 8 bits with a scale per row, or 4 bits with one per group of a row.

    With 4 bits, embeddings, output head and matrices that the kernel can't take have 8.
    """

    bits: int
    group_size: int = 0

    def __str__(self) -> str:
        return f"int{self.bits}" + (f"-g{self.group_size}" if self.group_size else "")

    def config(self) -> dict[str, Any]:
        """The quantization_config of a checkpoint stored so."""
        return {
            "quant_method": METHOD,
            "version": FORMAT_VERSION,
            "bits": self.bits,
            "group_size": self.group_size,
        }


SCHEMES = {"int8": Scheme(8), "int4": Scheme(4, DEFAULT_GROUP_SIZE)}


def asked_scheme(name: str) -> Scheme | None:
    """The scheme that a load asks for by name; None for "". Raises InvalidRequest."""
    if not name:
        return None
    if name not in SCHEMES:
        raise InvalidRequest(
            f"quantize is {name!r}, allowed are {', '.join(SCHEMES)}", param="quantize"
        )
    return SCHEMES[name]


def stored_scheme(config: Mapping[str, Any]) -> Scheme | None:
    """The scheme that a checkpoint's config.json declares; None where its weights are plain.

    Raises UnsupportedModel for another method, or a version or numbers that are not ours.
    """
    declared = config.get("quantization_config") or config.get("compression_config")
    if not declared:
        return None
    method = declared.get("quant_method", "unknown") if isinstance(declared, dict) else "unknown"
    if method != METHOD:
        raise UnsupportedModel(f"the checkpoint is quantized ({method}), which is not supported")
    bits, group_size = declared.get("bits"), declared.get("group_size")
    known = (bits == 8 and group_size == 0) or (bits == 4 and group_size in GROUP_SIZES)
    if declared.get("version") != FORMAT_VERSION or not known:
        raise UnsupportedModel(
            f"config.json declares the quantization version {declared.get('version')!r}, "
            f"bits {bits!r}, group_size {group_size!r}; supported are version {FORMAT_VERSION} "
            f"with 8 and 0, or 4 and {', '.join(map(str, GROUP_SIZES))}"
        )
    return Scheme(bits, group_size)


def served_scheme(asked: str, config: Mapping[str, Any]) -> Scheme | None:
    """What is served: as stored, or as asked of a plain checkpoint.

    Raises:
        InvalidRequest: another one is asked for than the checkpoint has.
        UnsupportedModel: see `stored_scheme`.
    """
    wanted, stored = asked_scheme(asked), stored_scheme(config)
    if stored is not None and wanted is not None and wanted.bits != stored.bits:
        raise InvalidRequest(
            f"quantize is {asked!r}, but the checkpoint is quantized as {stored} already",
            param="quantize",
        )
    return stored or wanted
