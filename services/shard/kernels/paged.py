"""Paged attention on a CPU: the compiled kernel as functions of tensors.

The kernel reads the pool where it lies; nothing is gathered and no mask is made. What it computes
for a token follows from the token's own sequence alone, bit for bit. It computes in float32
whatever the pool holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.shard.attention import ScoreRules
from services.shard.kernels.library import Library

Ints = npt.NDArray[np.int64]

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ATTENTION = (
    *(_POINTER, _POINTER, _INT, _INT, _POINTER, _POINTER, _POINTER, _INT, _POINTER, _POINTER),
    *(_INT, _INT, _INT, _INT, _INT, _INT, _FLOAT, _FLOAT, _POINTER),
)
_WRITE = (
    *(_POINTER, _POINTER, _POINTER, _INT, _INT, _INT),
    *(_POINTER, _INT, _INT, _POINTER, _INT, _INT),
)
# Of pools.
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class PagedRows:
    """One step's rows, packed one after another, as the kernel reads them.

    Attributes:
        block_tables: [rows, blocks]; entries past a row's context are not read.
        query_lens: query tokens of each row, at least 1; the last of its context.
        context_lens: tokens of each row's sequence, its query tokens included.
        arguments: addresses and sizes of these, in the kernel's order; asked for once per step,
            as they take longer to come by than all else that a layer does in Python.
    """

    block_tables: Ints
    query_lens: Ints
    context_lens: Ints
    arguments: tuple[int, int, int, int, int]

    @classmethod
    def of(cls, block_tables: Ints, query_lens: Ints, context_lens: Ints) -> PagedRows:
        """Of arrays in any layout."""
        given = (block_tables, query_lens, context_lens)
        tables, queries, contexts = (np.ascontiguousarray(array, np.int64) for array in given)
        addresses = (queries.ctypes.data, contexts.ctypes.data)
        arguments = (tables.ctypes.data, tables.shape[1], *addresses, len(queries))
        return cls(tables, queries, contexts, arguments)


@dataclass(frozen=True, slots=True)
class NeededTokens:
    """Tokens of a step, ascending, whose states are asked for behind the model's last layer.

    Attributes:
        tokens: int64 [count], places among the packed ones.
        rows: a row for each: its sequence, up to it.
    """

    tokens: Ints
    rows: PagedRows


class PagedAttention:
    """The kernels for pools of one type."""

    def __init__(self, library: Library, dtype: torch.dtype) -> None:
        """Takes a type among DTYPES."""
        name = str(dtype).removeprefix("torch.")
        self._attend = library.function(f"paged_attention_{name}", *_ATTENTION)
        self._write: Callable[..., None] = library.function(f"write_kv_{name}", *_WRITE)

    def attend(
        self,
        q: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        rows: PagedRows,
        rules: ScoreRules,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Causal attention; returns [num_tokens, num_heads, head_dim] of the type of `q`.

        Args:
            q: [num_tokens, num_heads, head_dim]; widened where it is not float32, and the result
                is rounded to its type.
            k_pool, v_pool: [num_blocks, block_size, num_kv_heads, head_dim], contiguous.
            sliding_window: a token sees itself and the sliding_window - 1 before it.
        """
        given = q.dtype
        q = _readable(q)
        _, block_size, num_kv_heads, head_dim = k_pool.shape
        sinks = None if rules.sinks is None else rules.sinks.float().contiguous()
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        self._attend(
            out.data_ptr(),
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            k_pool.data_ptr(),
            v_pool.data_ptr(),
            *rows.arguments,
            block_size,
            q.shape[1],
            num_kv_heads,
            head_dim,
            sliding_window or 0,
            rules.scale,
            rules.softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
        )
        return out.to(given)

    def write(
        self,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        token_slots: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        """Stores K and V [num_tokens, num_kv_heads, head_dim] at block * block_size + offset.

        Args:
            k_pool, v_pool: one layer's, as of `attend`.
            token_slots: [num_tokens] int64, contiguous.
            key, value: rounded to the pool's type, to the nearest and ties to even.
        """
        key, value = _readable(key), _readable(value)
        num_tokens, num_kv_heads, head_dim = key.shape
        self._write(
            k_pool.data_ptr(),
            v_pool.data_ptr(),
            token_slots.data_ptr(),
            num_tokens,
            num_kv_heads,
            head_dim,
            key.data_ptr(),
            key.stride(0),
            key.stride(1),
            value.data_ptr(),
            value.stride(0),
            value.stride(1),
        )


def _readable(states: torch.Tensor) -> torch.Tensor:
    """The states, or a copy in float32 whose heads are whole."""
    states = states.float()
    return states if states.stride(2) == 1 else states.contiguous()
