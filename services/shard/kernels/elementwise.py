"""Norms, rotations and gates on a CPU: the compiled kernels as functions of tensors.

Each gives what transformers' formula gives, in one pass over memory, rounded where it rounds. A
row's result follows from that row alone, bit for bit.
"""

from __future__ import annotations

import ctypes

import torch

from services.shard.kernels.library import Library

_POINTER, _INT, _FLAG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_ROWS = (_POINTER, _INT, _INT, _INT)
_NORM = (*_ROWS, *(_POINTER, _POINTER, _INT, _INT, _FLOAT, _FLOAT, _FLAG, _POINTER, _POINTER))
_ROTARY = (*_ROWS, *(_POINTER, _POINTER, _INT, _INT, _INT, _FLAG))
_GATE = (*_ROWS, *_ROWS, *(_INT, _INT, _POINTER))
DTYPES = (torch.float32, torch.bfloat16)
# Gated activations by transformers' names for them.
GATES = {
    "silu": "silu_mul",
    "swish": "silu_mul",
    "gelu": "gelu_erf_mul",
    "gelu_new": "gelu_tanh_mul",
    "gelu_pytorch_tanh": "gelu_tanh_mul",
}


class Elementwise:
    """The kernels for activations of one type. Tensors are on the CPU."""

    def __init__(self, library: Library, dtype: torch.dtype) -> None:
        """Takes a type among DTYPES."""
        name = _name(dtype)
        self.dtype = dtype
        self._norm = library.function(f"rms_norm_{name}", *_NORM)
        self._rotary = {
            table: library.function(f"rotary_{name}_{_name(table)}", *_ROTARY)
            for table in {dtype, torch.float32}
        }
        self._gates = {
            activation: library.function(f"{kernel}_{name}", *_GATE)
            for activation, kernel in GATES.items()
        }

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        offset: float = 0.0,
        round_first: bool = True,
    ) -> torch.Tensor:
        """x / sqrt(mean(x²) + eps) * (weight + offset) over the last dimension; contiguous.

        Args:
            x: [..., width], in any layout.
            weight: [width] of the same type.
            offset: 1 for Gemma's norms, whose weights are kept less 1.
            round_first: the normed values are rounded to the type before the weight, as Llama has
                it, and not only after, as Gemma and OLMo 2 do.
        """
        out = _like(x)
        self._run_norm(x, None, weight, (eps, offset, int(round_first)), out, out)
        return out

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        offset: float = 0.0,
        round_first: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm of x + residual, x + residual); both have the shape of x."""
        total, out = _like(x), _like(x)
        rules = (eps, offset, int(round_first))
        self._run_norm(x, residual.contiguous(), weight, rules, total, out)
        return out, total

    def rotate(
        self,
        states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        neighbours: bool = False,
    ) -> None:
        """Rotary embedding of queries or keys, in place.

        Args:
            states: [num_tokens, num_heads, head_dim]; a head's values are neighbours in memory.
            cos, sin: [num_tokens, pairs], one value for each pair of turned values: the first
                2 * pairs of a head. Of the type of `states`, and then each product is rounded to
                it, as most models do; or float32, and only the result is, as in OLMo 2 and Cohere.
            neighbours: pairs are (0, 1), (2, 3), … as in GLM and Cohere, and not (0, pairs),
                (1, pairs + 1), ….

        Raises:
            ValueError: a head's values are not neighbours, so there is nothing to do in place.
        """
        if states.stride(2) != 1:
            raise ValueError("the values of a head lie apart")
        if cos.stride(1) != 1 or cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        num_tokens, num_heads, _ = states.shape
        self._rotary[cos.dtype](
            states.data_ptr(),
            num_heads,
            states.stride(0),
            states.stride(1),
            cos.data_ptr(),
            sin.data_ptr(),
            cos.stride(0),
            num_tokens,
            cos.shape[1],
            int(neighbours),
        )

    def gate(self, activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """activation(gate) * up, contiguous.

        Args:
            activation: a name among GATES.
            gate, up: [..., width] of one shape, in any layout; the halves of one tensor, say.
        """
        width = gate.shape[-1]
        out = _like(gate)
        # Bound to names: a copy made for its layout must live until the kernel has read it.
        gate, *gate_layout = _rows(gate)
        up, *up_layout = _rows(up)
        self._gates[activation](
            gate.data_ptr(),
            *gate_layout,
            up.data_ptr(),
            *up_layout,
            out.numel() // width,
            width,
            out.data_ptr(),
        )
        return out

    def _run_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        rules: tuple[float, float, int],
        total: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        width = x.shape[-1]
        x, *layout = _rows(x)
        self._norm(
            x.data_ptr(),
            *layout,
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            out.numel() // width,
            width,
            *rules,
            total.data_ptr(),
            out.data_ptr(),
        )


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """The tensor, or a copy, and where its rows begin: row i at i // inner * the first stride +
    i % inner * the second."""
    if not x.is_contiguous():
        while x.dim() > 3 and x.shape[0] == 1:
            x = x[0]
        if x.dim() == 3 and x.stride(2) == 1:
            return x, x.shape[1], x.stride(0), x.stride(1)
        if x.dim() == 2 and x.stride(1) == 1:
            return x, 1, x.stride(0), 0
    return x.contiguous(), 1, x.shape[-1], 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
