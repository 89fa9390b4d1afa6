"""The framing of log and snapshot: whole records or none, found again after damage. Bytes only.

    file    header header record*
    header  "IMCACHE" version:u8 marker:16 crc32:u32       twice: one flipped bit spoils one copy
    record  marker:16 length:u32 crc32(payload):u32 crc32(length, payload crc):u32 payload

The marker is drawn per file, so that no stored text can contain one that looks like a record.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

_MAGIC = b"IMCACHE"
VERSION = 1
_MARKER_BYTES = 16
_HEADER = struct.Struct(f"<7sB{_MARKER_BYTES}s")
_CRC = struct.Struct("<I")
_FRAME = struct.Struct("<II")
HEADER_BYTES = 2 * (_HEADER.size + _CRC.size)
FRAME_BYTES = _MARKER_BYTES + _FRAME.size + _CRC.size


class UnreadableFile(Exception):
    """Neither copy of the header is whole, or its version is unknown."""


@dataclass(slots=True)
class Damage:
    """What `scan` met. Bytes after `end` are no whole record."""

    num_corrupt: int = 0
    end: int = 0
    is_truncated: bool = False


def new_marker() -> bytes:
    """The marker of a new file."""
    return os.urandom(_MARKER_BYTES)


def header(marker: bytes) -> bytes:
    """How a file starts."""
    body = _HEADER.pack(_MAGIC, VERSION, marker)
    return (body + _CRC.pack(zlib.crc32(body))) * 2


def frame(marker: bytes, payload: bytes) -> bytes:
    """One record."""
    sizes = _FRAME.pack(len(payload), zlib.crc32(payload))
    return b"".join((marker, sizes, _CRC.pack(zlib.crc32(sizes)), payload))


def scan(data: bytes, damage: Damage) -> Iterator[bytes]:
    """The payloads of all whole records, in order; fills in `damage` on the way.

    Raises:
        UnreadableFile: see there. A file shorter than a header is empty, not unreadable.
    """
    if len(data) < HEADER_BYTES:
        damage.is_truncated = len(data) > 0
        return
    marker = _read_marker(data)
    position = damage.end = HEADER_BYTES
    while position < len(data):
        if len(data) - position < FRAME_BYTES:
            damage.is_truncated = True
            return
        sizes = _read_frame(data, position, marker)
        if sizes is None:
            damage.num_corrupt += 1
            position = data.find(marker, position + 1)
            if position < 0:
                damage.is_truncated = True
                return
            continue
        length, crc = sizes
        start, position = position + FRAME_BYTES, position + FRAME_BYTES + length
        if position > len(data):
            damage.is_truncated = True
            return
        payload = data[start:position]
        damage.end = position
        if zlib.crc32(payload) == crc:
            yield payload
        else:
            damage.num_corrupt += 1


def _read_marker(data: bytes) -> bytes:
    size = HEADER_BYTES // 2
    for start in (0, size):
        body = data[start : start + _HEADER.size]
        (crc,) = _CRC.unpack_from(data, start + _HEADER.size)
        if zlib.crc32(body) == crc:
            magic, version, marker = _HEADER.unpack(body)
            if magic == _MAGIC and version == VERSION:
                return bytes(marker)
            raise UnreadableFile(f"it is of format {version}, this program reads {VERSION}")
    raise UnreadableFile("its header is damaged")


def _read_frame(data: bytes, position: int, marker: bytes) -> tuple[int, int] | None:
    """Length and checksum of the payload; None where the frame is damaged."""
    after = position + _MARKER_BYTES
    sizes = data[after : after + _FRAME.size]
    (crc,) = _CRC.unpack_from(data, after + _FRAME.size)
    if data[position:after] != marker or zlib.crc32(sizes) != crc:
        return None
    length, payload_crc = _FRAME.unpack(sizes)
    return length, payload_crc
