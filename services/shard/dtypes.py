"""Which float type a model is served in, and its K and V are kept in. Decides from facts; reads no
file.

float16 is never computed on a CPU, which does it slower and less exactly than either neighbour.
bfloat16 is only where the CPU has vector instructions for it: elsewhere each product converts its
operands first, at half the speed of float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from infermesh.errors import InvalidRequest
from infermesh.telemetry import logs

_log = logs.get(__name__)

NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_NAMES = ("float32", "bfloat16")
# torch's own word for what it was dispatched to on this CPU; others convert bfloat16 in the kernel.
_WITHOUT_BFLOAT16 = frozenset({"DEFAULT", "AVX2"})
# Of the memory that is free, what doubled weights may take: the KV cache needs some, too.
_LARGEST_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Host:
    """What the choice depends on beside the model."""

    device: torch.device
    cpu_capability: str
    available_bytes: int
    # Ours widen bfloat16 in registers, on any processor.
    has_kernels: bool = False


def choose_dtype(asked: str, stored: str, num_parameters: int, host: Host) -> torch.dtype:
    """The asked type, or with "auto" the stored one, unless this host computes it badly.

    Args:
        asked: "auto" or a name of NAMES.
        stored: what the checkpoint declares or holds.

    Raises:
        InvalidRequest: neither is a type that is served.
    """
    name = stored if asked == "auto" else asked
    if name not in NAMES:
        raise InvalidRequest(
            f"dtype is {name!r}, allowed are auto, {', '.join(NAMES)}", param="dtype"
        )
    if host.device.type != "cpu":
        return NAMES[name]
    if name == "float16":
        _log.warning("float16 is served as float32 on a CPU")
        return torch.float32
    is_slow = host.cpu_capability in _WITHOUT_BFLOAT16 and not host.has_kernels
    if name == "bfloat16" and is_slow:
        fits = num_parameters * torch.float32.itemsize <= host.available_bytes * _LARGEST_SHARE
        if asked == "auto" and fits:
            _log.info("bfloat16 weights are served as float32: this CPU is faster with them")
            return torch.float32
        _log.warning("bfloat16 is slow on this CPU, which has no instructions for it")
    return NAMES[name]


def choose_kv_dtype(asked: str, served: torch.dtype) -> torch.dtype:
    """The asked type of the KV cache, or with "auto" the one that the model is served in.

    Args:
        asked: "auto" or one of KV_NAMES.
        served: see choose_dtype; of quantized weights it is what their checkpoint declares.

    Raises:
        InvalidRequest: it is none of them.
    """
    if asked == "auto":
        return served
    if asked not in KV_NAMES:
        raise InvalidRequest(
            f"kv_cache_dtype is {asked!r}, allowed are auto, {', '.join(KV_NAMES)}",
            param="kv_cache_dtype",
        )
    return NAMES[asked]
