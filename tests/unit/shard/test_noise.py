"""Philox against the published vectors, and what the sampler relies on."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.shard.noise import Purpose, philox, uniforms

# Random123's kat_vectors: philox4x32, 10 rounds.
_KNOWN = (
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
)

_ids = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))


def test_philox_gives_the_published_words_when_run_together() -> None:
    counters, keys, wanted = (np.array([k[i] for k in _KNOWN], dtype=np.uint64) for i in range(3))
    assert philox(counters, keys).tolist() == wanted.tolist()


@given(st.lists(_ids, min_size=1, max_size=8))
def test_uniforms_are_the_same_when_rows_are_computed_alone(
    rows: list[tuple[int, int, int]],
) -> None:
    seeds, choices, positions = (list(column) for column in zip(*rows, strict=True))
    together = uniforms(seeds, choices, positions, Purpose.SAMPLE)
    alone = [uniforms([s], [c], [p], Purpose.SAMPLE)[0] for s, c, p in rows]
    assert together.tolist() == alone
    assert ((together > 0) & (together < 1)).all()


def test_uniforms_differ_when_any_part_of_the_key_differs() -> None:
    values = {
        float(uniforms([seed], [choice], [position], purpose)[0])
        for seed in (0, 1, 1 << 40)
        for choice in (0, 1)
        for position in (0, 1)
        for purpose in Purpose
    }
    assert len(values) == 3 * 2 * 2 * len(Purpose)


def test_uniforms_fill_the_interval_when_positions_run() -> None:
    n = 20_000
    values = uniforms([7] * n, [0] * n, list(range(n)), Purpose.SAMPLE)
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    chi_square = float(((counts - n / 20) ** 2 / (n / 20)).sum())
    assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001; the seed is fixed
