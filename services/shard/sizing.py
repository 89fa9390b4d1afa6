"""How many KV blocks a model gets, and how long its sequences may be with them."""

from __future__ import annotations

from dataclasses import dataclass

from infermesh.errors import InvalidRequest, OutOfMemory
from services.shard.domain import Capacity, LoadSpec

_CPU_SHARE = 0.25
_CPU_MOST_BYTES = 4 << 30
_CUDA_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Sizing:
    """The capacity, and the longest sequence that fits it."""

    capacity: Capacity
    max_model_len: int


def cpu_kv_budget(available_bytes: int, local_shards: int = 1) -> int:
    """KV bytes on a machine that others use too.

    What other shards take is no longer or not yet missing from `available_bytes` when they start
    together: each takes its part of what one would take alone.
    """
    return min(int(available_bytes * _CPU_SHARE), _CPU_MOST_BYTES) // local_shards


def cuda_kv_budget(
    total_bytes: int, free_bytes: int, own_bytes: int = 0, local_shards: int = 1
) -> int:
    """KV bytes on a device of our own, the weights being loaded.

    Args:
        own_bytes: what this process holds; counts where other shards share the device, because
            `free_bytes` changes while they load.
    """
    usable = int(total_bytes * _CUDA_SHARE)
    budget = usable - (total_bytes - free_bytes)
    if local_shards > 1:
        budget = min(budget, usable // local_shards - own_bytes)
    return max(0, budget)


def check_spec(spec: LoadSpec) -> None:
    """Raises InvalidRequest naming the field that is out of range."""
    for name, low, high in (
        ("block_size", 1, 1024),
        ("max_num_seqs", 1, 65_536),
        ("max_batch_tokens", 1, 1 << 24),
    ):
        value = getattr(spec, name)
        if not low <= value <= high:
            raise InvalidRequest(f"{name} is {value}, allowed are {low} to {high}", param=name)


def size(spec: LoadSpec, *, model_len: int, block_bytes: int, budget_bytes: int) -> Sizing:
    """Chooses the number of blocks: as asked, else what the budget holds, never more than all
    slots can use. A pool smaller than one sequence shortens the sequences.

    Args:
        model_len: positions that the model was made for.
        block_bytes: of one block over all layers; 0 where blocks cost nothing.
        budget_bytes: taken where the spec names neither blocks nor bytes.

    Raises:
        OutOfMemory: not even one block fits.
    """
    wanted_len = min(model_len, spec.max_model_len or model_len)
    useful = spec.max_num_seqs * -(-wanted_len // spec.block_size)
    if spec.num_blocks:
        num_blocks = spec.num_blocks
    elif block_bytes:
        num_blocks = min(useful, (spec.kv_cache_bytes or budget_bytes) // block_bytes)
    else:
        num_blocks = useful
    if num_blocks < 1:
        raise OutOfMemory(
            f"{budget_bytes >> 20} MiB are left for the KV cache, "
            f"one block of {spec.block_size} tokens takes {block_bytes >> 10} KiB"
        )
    return Sizing(
        Capacity(
            num_blocks=num_blocks,
            block_size=spec.block_size,
            max_num_seqs=spec.max_num_seqs,
            max_batch_tokens=spec.max_batch_tokens,
            kv_cache_bytes=num_blocks * block_bytes,
        ),
        min(wanted_len, num_blocks * spec.block_size),
    )
