"""Modules that compute with codes instead of weights, on a CPU. What a row gives depends on that
row alone, bit for bit: it shares no scale with its neighbours, and the kernels sum integers (8
bits) or in one order (4 bits) whatever the number of rows. ADR 18 has why these kernels.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from services.shard.footprint import WithoutParameters
from services.shard.row_codes import Codes

# An activation is two digits, high + low / 126 in units of its row's largest / 63. They have 7 bits
# each, because without VNNI the kernel adds two neighbouring products in 16 bits.
_DIGIT = 63
_ZERO_POINT = 64
_SMALLEST_PEAK = 1e-30
_ENGINE = "fbgemm"
# Rows that the int4 kernel packs together, on any CPU.
_PACKED_ROWS = 64
_PACK_ELEMENTS = 1 << 21
_INT4_ROW_MULTIPLE = 16

ops: Any = torch.ops


def is_available() -> bool:
    """Whether this build of torch has the kernels: x86 alone."""
    return _ENGINE in torch.backends.quantized.supported_engines


def takes_int4(num_rows: int, num_columns: int, group_size: int) -> bool:
    """Whether the int4 kernel takes a matrix of this shape."""
    return num_columns % group_size == 0 and num_rows % _INT4_ROW_MULTIPLE == 0


class Int8Matrix:
    """A matrix packed for the int8 kernel: one byte per weight, exact integer sums."""

    def __init__(self, codes: Codes) -> None:
        torch.backends.quantized.engine = _ENGINE
        zeros = torch.zeros(len(codes.codes), dtype=torch.long)
        with warnings.catch_warnings():  # deprecated, and the only way to this kernel; see ADR 18
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(
                codes.codes, codes.scales.double(), zeros, 0
            )
        self._packed = ops.quantized.linear_prepack(quantized, None)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, columns] → float32 [n, matrix rows]."""
        rows = rows.float()
        num_rows = len(rows)
        peaks = rows.abs().amax(dim=1, keepdim=True).clamp_min_(_SMALLEST_PEAK).div_(_DIGIT)
        digits = rows.new_empty(2 * num_rows, rows.shape[1])
        high, low = digits[:num_rows], digits[num_rows:]
        torch.div(rows, peaks, out=low)
        torch.round(low, out=high)
        low.sub_(high).mul_(2 * _DIGIT)  # the kernel rounds it
        sums = ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            digits, 1.0, _ZERO_POINT, self._packed
        )
        product: torch.Tensor = sums[:num_rows].add_(sums[num_rows:], alpha=0.5 / _DIGIT)
        return product.mul_(peaks)


class Int4Matrix:
    """A matrix packed for the int4 kernel: bfloat16 in and out, sums in float32."""

    def __init__(self, codes: Codes) -> None:
        if codes.zeros is None:
            raise AssertionError("codes of 4 bits have zero points")
        num_rows, num_columns = len(codes.codes), 2 * codes.codes.shape[1]
        self._group_size = codes.group_size
        self._packed = torch.empty(num_rows, num_columns // 2, dtype=torch.uint8)
        step = max(1, _PACK_ELEMENTS // num_columns // _PACKED_ROWS) * _PACKED_ROWS
        for start in range(0, num_rows, step):
            piece = codes.rows(start, min(num_rows, start + step)).nibbles().int()
            self._packed[start : start + step] = ops.aten._convert_weight_to_int4pack_for_cpu(
                piece, 1
            )
        self._scales = torch.stack((codes.scales.t(), codes.zeros.t()), dim=-1).contiguous()

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, columns] → bfloat16 [n, matrix rows]."""
        product: torch.Tensor = ops.aten._weight_int4pack_mm_for_cpu(
            rows.bfloat16().contiguous(), self._packed, self._group_size, self._scales
        )
        return product


def pack(codes: Codes) -> Int8Matrix | Int4Matrix:
    """The matrix for the kernel of its bits."""
    return Int8Matrix(codes) if codes.zeros is None else Int4Matrix(codes)


class Quantized(WithoutParameters):
    """A module whose weights come as codes, one `accept` per parameter that they stand for.

    It computes once it is packed; until then anybody may take its codes for other kernels.

    Attributes:
        codes: by the parameter that they stand for.
        shares_weights: they are another module's, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.codes: dict[str, Codes] = {}
        self.shares_weights = False

    def accept(self, leaf: str, codes: Codes) -> None:
        """Takes the codes of its parameter `leaf`."""
        if not self.shares_weights:
            self.num_weights += codes.codes.numel() * (1 if codes.zeros is None else 2)
        self.weight_bytes += codes.num_bytes
        self.codes[leaf] = codes

    def pack(self) -> None:
        """For torch's kernels; where there is nothing to multiply, nothing."""


class QuantizedLinear(Quantized):
    """In place of nn.Linear, and of GPT-2's Conv1D, whose matrix is the other way round."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.bias: nn.Parameter | None = original.bias
        self._matrix: Int8Matrix | Int4Matrix | None = None

    def pack(self) -> None:
        self._matrix = pack(self.codes.pop("weight"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out], in x's type."""
        assert self._matrix is not None
        product = self._matrix.multiply(x.reshape(-1, x.shape[-1])).to(x.dtype)
        if self.bias is not None:
            product += self.bias
        return product.view(*x.shape[:-1], product.shape[-1])


class QuantizedEmbedding(Quantized):
    """In place of nn.Embedding; 8 bits. Gemma 3's scales what it looks up."""

    def __init__(self, original: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        scale: torch.Tensor | None = getattr(original, "embed_scale", None)
        self.embed_scale: torch.Tensor | None
        self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] → [..., width]."""
        codes = self.codes["weight"]
        rows = (codes.codes[ids].float() * codes.scales[ids, None]).to(self.dtype)
        if self.embed_scale is not None:
            rows = rows * self.embed_scale.to(self.dtype)
        return rows


class QuantizedExperts(Quantized):
    """In place of transformers' experts of Mixtral and Qwen 3 MoE: `gate_up_proj`, `down_proj`."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.act_fn = original.act_fn
        self._num_experts: int = original.num_experts
        self._matrices: dict[str, list[Int8Matrix | Int4Matrix]] = {}

    def each(self, leaf: str) -> list[Codes]:
        """The codes of every expert's matrix, taken out: they lie one below the other."""
        codes = self.codes.pop(leaf)
        size = len(codes.codes) // self._num_experts
        return [codes.rows(size * i, size * (i + 1)) for i in range(self._num_experts)]

    def pack(self) -> None:
        for leaf in list(self.codes):
            self._matrices[leaf] = [pack(codes) for codes in self.each(leaf)]

    def forward(
        self, x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, width], and of each token its experts and their weights [tokens, k]."""
        out = torch.zeros_like(x)
        for expert in sorted(set(expert_ids.flatten().tolist())):
            tokens, places = torch.where(expert_ids == expert)
            both = self._matrices["gate_up_proj"][expert].multiply(x[tokens]).to(x.dtype)
            gate, up = both.chunk(2, dim=-1)
            hidden = self.act_fn(gate) * up
            down = self._matrices["down_proj"][expert].multiply(hidden).to(x.dtype)
            out.index_add_(0, tokens, down * expert_weights[tokens, places, None].to(x.dtype))
        return out


def pack_codes(model: nn.Module) -> None:
    """Packs every quantized module of a model for torch's kernels."""
    for module in model.modules():
        if isinstance(module, Quantized):
            module.pack()
