"""Reusable working memory: fresh large tensors cost more in page faults than in arithmetic."""

from __future__ import annotations

import math

import torch


class Scratch:
    """Named buffers that grow and are handed out again; one owner thread, one use at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory; it overwrites what was taken by this name before."""
        wanted = math.prod(size)
        held = self._buffers.get((name, dtype))
        if held is None or held.numel() < wanted:
            held = torch.empty(wanted, dtype=dtype, device=self._device)
            self._buffers[name, dtype] = held
        return held[:wanted].view(size)
