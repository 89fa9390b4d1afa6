"""How many query tokens the device is given at once, after it ran out of memory. Pure."""

from __future__ import annotations

# Steps within the limit before a larger batch is tried.
PATIENCE = 64


class BatchLimit:
    """None until something did not fit; halved then, and slowly raised while all goes well.

    A try that fails costs one computation and sends the limit back to what went well before.
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        self._patience = patience
        self._kept = 0
        # What has worked for a whole round of patience.
        self._proven = 0
        self.tokens: int | None = None

    def refused(self, num_tokens: int) -> None:
        """So many tokens did not fit."""
        if self._proven >= num_tokens:
            self._proven = 0
        self.tokens = max(1, num_tokens // 2, self._proven)
        self._kept = 0

    def settle(self, before: int | None, num_fitted: int, is_size: bool) -> None:
        """After a step that was refused in part: `num_fitted` tokens fitted at once in it.

        Where a single token did not fit (not `is_size`), its size was not the reason.
        """
        if self.tokens is not None and self.tokens != before:
            self.tokens = max(self.tokens, num_fitted) if is_size else before

    def kept(self) -> None:
        """A step that was cut to the limit has run."""
        if self.tokens is None:
            return
        self._kept += 1
        if self._kept >= self._patience:
            self._proven = self.tokens
            self.tokens += max(1, self.tokens // 4)
            self._kept = 0
