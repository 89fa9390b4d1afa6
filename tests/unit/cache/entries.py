"""Entries and drafts for tests."""

from __future__ import annotations

import hashlib
from typing import Any

from services.cache.domain import Answer, Draft, Entry, EntryId, Keys, Mark, Query, Traits

OPEN = Traits(semantic_enabled=True)
# The cache that tests offer drafts to.
INSTANCE = b"one life of a cache"


def keys(text: str = "q", *, domain: str = "acme", context: str = "", model: str = "m") -> Keys:
    def digest(*parts: str) -> bytes:
        return hashlib.sha256("\0".join(parts).encode()).digest()

    return Keys(digest(context, text), digest(context), domain, domain, model, f"{model}-print")


def entry(number: int, *, text: str = "", created_s: float = 0.0, **fields: Any) -> Entry:
    own = {name: fields.pop(name) for name in ("domain", "context", "model") if name in fields}
    text = text or f"question {number}"
    values: dict[str, Any] = {
        "id": EntryId(number),
        "keys": keys(text, **own),
        "text": text,
        "answer": Answer(b"x" * 100, 1.0),
        "created_s": created_s,
        "expires_s": created_s + 1000.0,
        "is_semantic": True,
    }
    return Entry(**{**values, **fields})


def draft(text: str, **fields: Any) -> Draft:
    own = {name: fields.pop(name) for name in ("domain", "context", "model") if name in fields}
    values: dict[str, Any] = {
        "keys": keys(text, **own),
        "text": text,
        "traits": OPEN,
        "answer": Answer(text.encode(), 1.0),
        "mark": Mark(INSTANCE, 0),
    }
    return Draft(**{**values, **fields})


def query(text: str, **fields: Any) -> Query:
    own = {name: fields.pop(name) for name in ("domain", "context", "model") if name in fields}
    return Query(**{"keys": keys(text, **own), "text": text, "traits": OPEN, **fields})
