"""What the log says: one struct per kind of record, as MessagePack. Nothing executable is read."""

from __future__ import annotations

import msgspec

from services.cache.domain import Answer, Entry, EntryId, Keys


class Kept(msgspec.Struct, frozen=True, array_like=True, tag="kept"):
    """An entry was kept, or stands in a snapshot."""

    id: int
    exact_fingerprint: bytes
    compatibility_fingerprint: bytes
    tenant: str
    sharing_domain: str
    model_id: str
    model_fingerprint: str
    text: str
    payload: bytes
    compute_s: float
    created_s: float
    expires_s: float
    is_semantic: bool
    num_hits: int = 0


class Embedded(msgspec.Struct, frozen=True, array_like=True, tag="vector"):
    """An entry's text was embedded; float32, little-endian."""

    id: int
    embedder: str
    values: bytes


class Removed(msgspec.Struct, frozen=True, array_like=True, tag="removed"):
    """Entries are gone."""

    ids: list[int]


class Quarantined(msgspec.Struct, frozen=True, array_like=True, tag="quarantined"):
    """A request is kept out."""

    id: int
    exact_fingerprint: bytes
    sharing_domain: str
    model_fingerprint: str
    until_s: float


class Epoch(msgspec.Struct, frozen=True, array_like=True, tag="epoch"):
    """Everything before this is void."""

    epoch: int


Record = Kept | Embedded | Removed | Quarantined | Epoch
# What must not come back if one record is damaged is written twice: it says "no longer".
CRITICAL = (Removed, Quarantined, Epoch)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


def encode(record: Record) -> bytes:
    """A record as a payload."""
    return _encoder.encode(record)


def decode(payload: bytes) -> Record | None:
    """The record; None where the payload is none."""
    try:
        record: Record = _decoder.decode(payload)
    except (msgspec.DecodeError, ValueError):
        return None
    return record


def of_entry(entry: Entry, num_hits: int = 0) -> Kept:
    """An entry as a record."""
    keys = entry.keys
    return Kept(
        entry.id,
        keys.exact_fingerprint,
        keys.compatibility_fingerprint,
        keys.tenant,
        keys.sharing_domain,
        keys.model_id,
        keys.model_fingerprint,
        entry.text,
        entry.answer.payload,
        entry.answer.compute_s,
        entry.created_s,
        entry.expires_s,
        entry.is_semantic,
        num_hits,
    )


def to_entry(kept: Kept) -> Entry:
    """The inverse of `of_entry`, less the hits."""
    keys = Keys(
        kept.exact_fingerprint,
        kept.compatibility_fingerprint,
        kept.tenant,
        kept.sharing_domain,
        kept.model_id,
        kept.model_fingerprint,
    )
    return Entry(
        EntryId(kept.id),
        keys,
        kept.text,
        Answer(kept.payload, kept.compute_s),
        kept.created_s,
        kept.expires_s,
        kept.is_semantic,
    )
