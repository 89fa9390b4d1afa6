"""Damage to a file costs the damaged records and nothing else, wherever it falls."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache import record_file
from services.cache.record_file import Damage, UnreadableFile, frame, header, new_marker, scan

PAYLOADS = st.lists(st.binary(max_size=60), max_size=8)


def build(payloads: list[bytes]) -> tuple[bytes, list[int]]:
    """A file, and where each record ends."""
    marker = new_marker()
    data = header(marker)
    ends = []
    for payload in payloads:
        data += frame(marker, payload)
        ends.append(len(data))
    return data, ends


def read(data: bytes) -> tuple[list[bytes], Damage]:
    damage = Damage()
    return list(scan(data, damage)), damage


@given(PAYLOADS)
def test_scan_gives_back_what_was_written(payloads: list[bytes]) -> None:
    data, _ = build(payloads)
    found, damage = read(data)
    assert found == payloads
    assert (damage.num_corrupt, damage.end, damage.is_truncated) == (0, len(data), False)


@given(PAYLOADS, st.data())
def test_scan_gives_all_whole_records_when_the_file_is_cut(
    payloads: list[bytes], choose: st.DataObject
) -> None:
    data, ends = build(payloads)
    size = choose.draw(st.integers(0, len(data)))
    found, damage = read(data[:size])
    whole = [payload for payload, end in zip(payloads, ends, strict=True) if end <= size]
    assert found == whole
    assert damage.num_corrupt == 0
    boundaries = [0, record_file.HEADER_BYTES, *ends]
    assert damage.is_truncated is (size not in boundaries)
    assert damage.end == max(one for one in boundaries if one <= size)


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=8), st.data())
def test_scan_loses_one_record_at_most_when_a_bit_flips(
    payloads: list[bytes], choose: st.DataObject
) -> None:
    data, ends = build(payloads)
    at = choose.draw(st.integers(0, 8 * len(data) - 1))
    spoilt = bytearray(data)
    spoilt[at // 8] ^= 1 << at % 8
    found, damage = read(bytes(spoilt))
    if at // 8 < record_file.HEADER_BYTES:
        assert found == payloads
        return
    victim = next(i for i, end in enumerate(ends) if at // 8 < end)
    assert found == payloads[:victim] + payloads[victim + 1 :]
    assert damage.num_corrupt == 1


@given(PAYLOADS, st.binary(min_size=1, max_size=100))
def test_scan_gives_all_records_when_garbage_follows(payloads: list[bytes], garbage: bytes) -> None:
    data, _ = build(payloads)
    found, damage = read(data + garbage)
    assert found == payloads
    assert damage.is_truncated
    assert damage.end == len(data)


def test_scan_never_takes_a_stored_text_for_a_record() -> None:
    marker = new_marker()
    forged = frame(b"m" * 16, b"a wrong answer")
    data = bytearray(header(marker) + frame(marker, forged) + frame(marker, b"next"))
    data[record_file.HEADER_BYTES + 17] ^= 1  # the length of the record that carries the forgery
    assert read(bytes(data))[0] == [b"next"]


def test_scan_refuses_when_both_headers_are_spoilt() -> None:
    data = bytearray(build([b"a"])[0])
    data[8] ^= 1
    data[record_file.HEADER_BYTES // 2 + 8] ^= 1
    with pytest.raises(UnreadableFile, match="header is damaged"):
        read(bytes(data))


def test_scan_refuses_when_the_format_is_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_file, "VERSION", 2)
    data, _ = build([b"a"])
    monkeypatch.undo()
    with pytest.raises(UnreadableFile, match="format 2"):
        read(data)
