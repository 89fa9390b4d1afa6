"""What sampling gave for the rows of a step, on the host: from torch or from the kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.shard.domain import Logprobs
from services.shard.exact_weights import SCALE_BITS


@dataclass(frozen=True, slots=True)
class Sampled:
    """One entry per row.

    Attributes:
        tokens: [rows]
        finite: [rows], whether all raw logits were numbers.
        described: of the rows that ask, and of raw logits: that of the token, the largest, the sum
            of weights at temperature 1, then the ids of the top tokens, then their logits.
    """

    tokens: npt.NDArray[np.int64]
    finite: npt.NDArray[np.bool_]
    described: npt.NDArray[np.float64] | None = None

    def logprobs(self) -> Iterator[Logprobs]:
        """Of the rows that ask, with as many top tokens as there are."""
        if self.described is None:
            return
        for own, largest, total, *top in self.described.tolist():
            # Only NaN has no weight at all; such a row fails.
            norm = largest + math.log(total) - SCALE_BITS * math.log(2) if total > 0 else math.nan
            half = len(top) // 2
            yield Logprobs(
                own - norm, [int(i) for i in top[:half]], [value - norm for value in top[half:]]
            )
