"""What a key looks like and what is kept of it. Pure but for the random bits.

    im-<key id, 12 characters>-<secret, 52 characters of base32: 256 random bits>

Kept is SHA-256 of the whole text. A slow hash guards guessable passwords; 256 random bits can't be
guessed, and a key is checked on a request's way.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets

from services.auth.values import KeyId

_ID_BYTES, _ID_CHARS = 8, 12
_SECRET_BYTES = 32
_FORM = re.compile(r"im-([a-z2-7]{12})-[a-z2-7]{52}")


def draw() -> tuple[KeyId, str]:
    """A new key: its id, and its text, which is shown once."""
    key_id = _base32(secrets.token_bytes(_ID_BYTES))[:_ID_CHARS]
    return KeyId(key_id), f"{prefix(KeyId(key_id))}{_base32(secrets.token_bytes(_SECRET_BYTES))}"


def prefix(key_id: KeyId) -> str:
    """How the text of a key begins, for lists."""
    return f"im-{key_id}-"


def id_of(text: str) -> KeyId | None:
    """The id inside a key's text; None where it is no key of ours."""
    found = _FORM.fullmatch(text)
    return KeyId(found[1]) if found else None


def hashed(text: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(text.encode()).digest()


def matches(text: str, kept: bytes) -> bool:
    """In the same time wherever they differ."""
    return hmac.compare_digest(hashed(text), kept)


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()
