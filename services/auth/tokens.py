"""JSON Web Tokens of an issuer whose public keys are configured, as credentials beside API keys.

RFC 7519 with a JWKS file (RFC 7517). A token names its tenant in the claim `tenant` and may narrow
itself by `scope` (words) and `models` (a list). Asymmetric algorithms alone: what can check a token
can't make one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt

from infermesh.config import AuthConfig, ConfigError
from infermesh.errors import InvalidApiKey
from services.auth.values import SCOPES, Key, KeyId, TenantId

_ALGORITHMS = ("RS256", "PS256", "ES256", "EdDSA")
_REQUIRED = ("exp", "iss", "aud", "sub")
_MAX_ID_CHARS = 32
_MAX_VALID_S = 100 * 365 * 86_400


@dataclass(frozen=True, slots=True)
class Claims:
    """A token that was checked, as if it were a key of its tenant."""

    key: Key
    expires_at: float


class Tokens:
    """Checks tokens.

    Args:
        clock: seconds of the Unix epoch.

    Raises:
        ConfigError: the key file can't be used.
    """

    def __init__(self, config: AuthConfig, clock: Callable[[], float]) -> None:
        self._issuer = config.jwt_issuer
        self._audience = config.jwt_audience
        self._clock = clock
        self._keys = _read(Path(config.jwt_keys_file).expanduser())
        if not self._issuer:
            raise ConfigError("auth.jwt_issuer is empty; with auth.jwt_keys_file it must be given")

    @staticmethod
    def is_token(text: str) -> bool:
        """Three parts, as no API key has."""
        return text.count(".") == 2

    def check(self, text: str) -> Claims:
        """What a token claims.

        Raises:
            InvalidApiKey: it is not signed by a known key, not for this mesh, or has expired.
        """
        try:
            key = self._keys[jwt.get_unverified_header(text)["kid"]]
            claims: dict[str, Any] = jwt.decode(
                text,
                key,
                algorithms=list(_ALGORITHMS),
                issuer=self._issuer,
                audience=self._audience,
                # times are checked below, by the clock of this service
                options={
                    "require": list(_REQUIRED),
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
            return self._claims(claims)
        except (jwt.PyJWTError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise InvalidApiKey(f"Incorrect token provided ({type(error).__name__}).") from None

    def _claims(self, claims: dict[str, Any]) -> Claims:
        now, expires_at = self._clock(), float(claims["exp"])
        if not math.isfinite(expires_at) or expires_at > now + _MAX_VALID_S:
            raise ValueError
        if expires_at <= now:
            raise InvalidApiKey("Incorrect token provided: it has expired.")
        if float(claims.get("nbf", now)) > now:
            raise InvalidApiKey("Incorrect token provided: it is not valid yet.")
        words = claims.get("scope")
        if not isinstance(words, str | None):
            raise TypeError
        scopes = SCOPES if words is None else tuple(s for s in SCOPES if s in words.split())
        models = claims.get("models", [])
        if not isinstance(models, list):
            raise TypeError
        key = Key(
            id=_key_id(str(claims["sub"])),
            tenant_id=TenantId(str(claims["tenant"])),
            name=str(claims["sub"]),
            scopes=scopes,
            models=tuple(map(str, models)),
            created_at=int(now),
        )
        return Claims(key, expires_at)


def _key_id(subject: str) -> KeyId:
    """Of its own for each subject, also where that is longer than the column."""
    whole = f"jwt:{subject}"
    if len(whole) > _MAX_ID_CHARS:
        whole = f"jwt:{hashlib.sha256(subject.encode()).hexdigest()}"[:_MAX_ID_CHARS]
    return KeyId(whole)


def _read(path: Path) -> dict[str, jwt.PyJWK]:
    """Public keys by their `kid`."""
    try:
        keys = jwt.PyJWKSet.from_json(path.read_text(encoding="utf-8")).keys
    except OSError as error:
        raise ConfigError(
            f"auth.jwt_keys_file is {path}, which can't be read: {error.strerror}"
        ) from None
    except (jwt.PyJWTError, ValueError, TypeError, AttributeError):
        raise ConfigError(f"auth.jwt_keys_file is {path}, which is no JWKS file") from None
    found = {key.key_id: key for key in keys if key.key_id and key.algorithm_name in _ALGORITHMS}
    if not found:
        raise ConfigError(
            f"auth.jwt_keys_file is {path}, which has no usable public key with a kid"
        )
    return found
