"""The tokens of one sequence that penalties look at, kept sparse and appended to in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class TokenHistory:
    """Distinct tokens of prompt and output, with their count in the output.

    Arrays with spare room instead of lists: a step concatenates them without a loop over tokens.
    """

    def __init__(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        self._index: dict[int, int] = {}
        room = max(64, 2 * len(set(prompt) | set(output)))
        self._ids = np.zeros(room, dtype=np.int64)
        self._counts = np.zeros(room, dtype=np.float32)
        for token in prompt:
            self._find(token)
        for token in output:
            self.append(token)

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """Distinct tokens, in order of first appearance."""
        return self._ids[: len(self._index)]

    @property
    def output_counts(self) -> npt.NDArray[np.float32]:
        """How often each of `token_ids` is in the output."""
        return self._counts[: len(self._index)]

    def append(self, token: int) -> None:
        """Counts one output token."""
        place = self._find(token)  # first: it may replace the arrays by larger ones
        self._counts[place] += 1.0

    def _find(self, token: int) -> int:
        place = self._index.get(token)
        if place is None:
            place = len(self._index)
            if place == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._index[token] = place
            self._ids[place] = token
        return place
