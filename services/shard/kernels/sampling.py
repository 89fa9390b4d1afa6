"""Sampling by the C++ kernel: one pass over a row for what it asks, rows side by side in threads.

Gives the tokens that `torch_sampler` gives on a CPU, bit for bit.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from services.shard.kernels.library import Library
from services.shard.row_plan import MOST_TOP, RowPlan
from services.shard.sampled import Sampled

_ADDRESS, _INT32, _INT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
# token, state, then what is described: logit, largest, total
_COLUMNS = 5


class SamplingKernel:
    """The kernel of one library."""

    def __init__(self, library: Library) -> None:
        types = (_ADDRESS, _INT32, _INT64, _INT64, *[_ADDRESS] * 7, _INT64)
        self._sample_rows = library.function("sample_rows", *types)

    def sample(self, logits: torch.Tensor, plan: RowPlan) -> Sampled:
        """One token per row.

        Args:
            logits: [rows, vocab_size] on the CPU, of any float type; never changed.

        Raises:
            MemoryError: there was none for a row.
        """
        if logits.dtype not in (torch.float32, torch.bfloat16):
            logits = logits.float()
        logits = logits.contiguous()
        num_rows, vocab = logits.shape
        out = np.zeros((num_rows, _COLUMNS + 2 * min(MOST_TOP, vocab)))
        edits = (
            plan.bias_ids,
            plan.bias,
            plan.history_ids,
            plan.output_counts,
            plan.suppressed_ids,
        )
        self._sample_rows(
            logits.data_ptr(),
            logits.dtype == torch.bfloat16,
            num_rows,
            vocab,
            *(array.ctypes.data for array in (plan.table, *edits, out)),
            out.shape[1],
        )
        if (out[:, 1] < 0).any():
            raise MemoryError("no memory to sample a row")
        asking = np.flatnonzero(plan.table["described"])
        described = out[asking, 2:] if len(asking) else None
        return Sampled(out[:, 0].astype(np.int64), out[:, 1] > 0, described)
