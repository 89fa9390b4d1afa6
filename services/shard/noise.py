"""Counter-based noise: the same uniform for the same (seed, choice, position, purpose), whatever
else runs in the batch and in whatever order.

Philox-4x32-10 of J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel Random Numbers: As
Easy as 1, 2, 3", SC 2011, vectorised over rows with numpy.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
_ROUNDS = np.arange(10, dtype=np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

Words = npt.NDArray[np.uint64]


class Purpose(enum.IntEnum):
    """What the noise is for; a number is never reused for something else."""

    SAMPLE = 0
    SIMULATED_TOKEN = 1


def philox(counter: Words, key: Words) -> Words:
    """Random 32-bit words [n, 4] for counters [n, 4] and keys [n, 2], each word in a uint64."""
    # Two halves of a round side by side, as numpy's calls are what it costs.
    even, odd = counter[:, 0::2], counter[:, 1::2]
    for of_round in (key + _ROUNDS[:, None, None] * _KEY_STEPS) & _LOW:
        product = even * _MULTIPLIERS
        even = (product >> _SHIFT)[:, ::-1] ^ odd ^ of_round
        odd = (product & _LOW)[:, ::-1]
    words = np.empty_like(counter)
    words[:, 0::2], words[:, 1::2] = even, odd
    return words


def uniforms(
    seeds: Sequence[int], choices: Sequence[int], positions: Sequence[int], purpose: Purpose
) -> npt.NDArray[np.float64]:
    """One number in (0, 1) per row, from 48 random bits, so that it is exact in float64 and its
    product with a sum of probabilities stays below that sum.

    Args:
        seeds: 64-bit seeds.
        choices: index of the choice within its request.
        positions: absolute position, in its sequence, of the token to be drawn.
    """
    seed = np.array(seeds, dtype=np.uint64)
    counter = np.zeros((len(seed), 4), dtype=np.uint64)
    counter[:, 0] = np.array(positions, dtype=np.uint64)
    counter[:, 1] = np.array(choices, dtype=np.uint64)
    counter[:, 2] = purpose
    words = philox(counter, np.stack((seed & _LOW, seed >> _SHIFT), axis=1))
    bits = (words[:, 0] << np.uint64(16)) | (words[:, 1] >> np.uint64(16))
    return (bits.astype(np.float64) + 0.5) / float(1 << 48)
