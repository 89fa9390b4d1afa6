"""The seam between the step stream and what computes: torch, or a profile of step times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from infermesh.errors import MeshError
from services.shard.domain import BlockId, Capacity, Logprobs, Manifest
from services.shard.slots import ActiveRow


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row gave: a token where it sampled, or the error it failed with."""

    token_id: int | None = None
    logprobs: Logprobs | None = None
    error: MeshError | None = None


@dataclass(frozen=True, slots=True)
class Computed:
    """One draw per row, and how long sampling took."""

    draws: Sequence[Draw]
    sample_s: float = 0.0


class Engine(Protocol):
    """Runs in the worker thread only. What it raises ends the epoch."""

    def copy_blocks(self, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Copies K and V of whole blocks, source to destination, in order."""

    def compute(self, rows: Sequence[ActiveRow], block_tables: npt.NDArray[np.int64]) -> Computed:
        """Runs the rows' tokens and samples; `block_tables` is indexed by slot."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to execute, and what peers need to know of it."""

    engine: Engine
    manifest: Manifest
    capacity: Capacity
    device: str
    # (name, content): tokenizer.json
    files: Sequence[tuple[str, bytes]]
