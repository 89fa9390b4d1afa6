"""Keys in SQL: created, listed, rotated, revoked, and checked for gateways."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from infermesh.errors import InvalidApiKey, InvalidRequest, NotFound
from infermesh.quota import Limits
from services.auth import api_key, changes
from services.auth import tenants as tenants_store
from services.auth.database import Database
from services.auth.schema import keys, tenants
from services.auth.tokens import Claims, Tokens
from services.auth.values import SCOPES, Key, KeyId, Policy, Tenant, TenantId

_MAX_VALID_S = 100 * 365 * 86_400
MAX_MODELS = 100


@dataclass(frozen=True, slots=True)
class Verified:
    """A good credential.

    Attributes:
        valid_for_s: until the key expires; None: it does not.
        sequence: of the change feed when the key was read, or before.
    """

    key: Key
    limits: Limits
    policy: Policy
    valid_for_s: float | None
    sequence: int


class Keys:
    """The table of keys.

    Args:
        tokens: what checks JSON Web Tokens; None: they are no credentials here.
        clock: seconds of the Unix epoch.
        on_change: called after a change was committed.
    """

    def __init__(
        self,
        database: Database,
        clock: Callable[[], float],
        on_change: Callable[[], None],
        tokens: Tokens | None = None,
    ) -> None:
        self._database = database
        self._tokens = tokens
        self._clock = clock
        self._on_change = on_change

    async def verify(self, text: str) -> Verified:
        """Whom a credential belongs to.

        Raises:
            InvalidApiKey: it is unknown, revoked or expired.
        """
        if self._tokens is not None and self._tokens.is_token(text):
            return await self._verify_token(self._tokens.check(text))
        key_id = api_key.id_of(text)
        if key_id is None:
            raise InvalidApiKey("Incorrect API key provided: it is no key of this mesh.")
        columns = [column for column in tenants.c if column.name not in ("id", "name")]
        query = sa.select(keys, *(c.label(f"tenant_{c.name}") for c in columns)).join(tenants)
        async with self._database.reading() as connection:
            # first: the key is then at least as new as this number says
            sequence = await changes.latest(connection)
            row = (await connection.execute(query.where(keys.c.id == key_id))).one_or_none()
        if row is None or not api_key.matches(text, row.hash):
            raise InvalidApiKey("Incorrect API key provided: it is unknown.")
        key = _key_of(row)
        now = self._clock()
        _refuse_ended(key, now)
        return Verified(
            key=key,
            limits=Limits(**_tenant_part(row, Limits)),
            policy=Policy(**_tenant_part(row, Policy)),
            valid_for_s=None if key.expires_at is None else key.expires_at - now,
            sequence=sequence,
        )

    async def _verify_token(self, claims: Claims) -> Verified:
        async with self._database.reading() as connection:
            sequence = await changes.latest(connection)
            try:
                tenant = await tenants_store.find(connection, claims.key.tenant_id)
            except NotFound:
                raise InvalidApiKey("Incorrect token provided: its tenant is unknown.") from None
        return Verified(
            key=claims.key,
            limits=tenant.limits,
            policy=tenant.policy,
            valid_for_s=claims.expires_at - self._clock(),
            sequence=sequence,
        )

    async def create(
        self,
        tenant_id: str,
        name: str,
        scopes: Sequence[str],
        models: Sequence[str],
        valid_for_s: float | None,
    ) -> tuple[Key, str]:
        """The key and its text. Raises NotFound or InvalidRequest."""
        tenants_store.check_name(name)
        _check_scopes(scopes, models)
        _check_validity(valid_for_s)
        now = self._clock()
        async with self._database.writing() as connection:
            tenant: Tenant = await tenants_store.find(connection, tenant_id)
            key_id, text = api_key.draw()
            key = Key(
                id=key_id,
                tenant_id=tenant.id,
                name=name,
                scopes=tuple(scopes) or SCOPES,
                models=tuple(models),
                created_at=int(now),
                expires_at=None if valid_for_s is None else int(now + valid_for_s),
            )
            await insert(connection, key, text)
        return key, text

    async def list(self, tenant_id: str) -> list[Key]:
        """Keys of a tenant, or of all; oldest first."""
        query = sa.select(keys).order_by(keys.c.created_at, keys.c.id)
        if tenant_id:
            query = query.where(keys.c.tenant_id == tenant_id)
        async with self._database.reading() as connection:
            return [_key_of(row) for row in await connection.execute(query)]

    async def rotate(self, key_id: str, overlap_s: float) -> tuple[Key, str]:
        """A key like another, which ends after the overlap; Raises NotFound or InvalidRequest."""
        if not 0 <= overlap_s <= _MAX_VALID_S:
            raise InvalidRequest(
                f"overlap is {overlap_s} seconds; it must be at least 0", param="overlap"
            )
        now = self._clock()
        async with self._database.writing() as connection:
            old = await _lock(connection, key_id)
            try:
                _refuse_ended(old, now)
            except InvalidApiKey as error:
                raise InvalidRequest(f"key {key_id}: {error.message}", param="key_id") from None
            if old.replaced_by is not None:  # its end is the overlap's, not its own
                raise InvalidRequest(
                    f"key {key_id} was replaced by {old.replaced_by}; rotate that", param="key_id"
                )
            new_id, text = api_key.draw()
            new = dataclasses.replace(old, id=new_id, created_at=int(now), replaced_by=None)
            ends_at = int(now + overlap_s)
            if old.expires_at is not None:
                ends_at = min(ends_at, old.expires_at)
                lifetime_s = old.expires_at - old.created_at
                new = dataclasses.replace(new, expires_at=int(now) + lifetime_s)
            await insert(connection, new, text)
            values = {"expires_at": ends_at, "replaced_by": new_id}
            await connection.execute(sa.update(keys).where(keys.c.id == key_id).values(**values))
            await changes.append(connection, now, key_id=old.id)
        self._on_change()
        return new, text

    async def revoke(self, key_id: str) -> Key:
        """Ends a key at once. Raises NotFound."""
        now = self._clock()
        async with self._database.writing() as connection:
            key = await _lock(connection, key_id)
            if key.revoked_at is None:
                key = dataclasses.replace(key, revoked_at=int(now))
                change = sa.update(keys).where(keys.c.id == key_id).values(revoked_at=int(now))
                await connection.execute(change)
                await changes.append(connection, now, key_id=key.id)
        self._on_change()
        return key


async def _lock(connection: AsyncConnection, key_id: str) -> Key:
    query = sa.select(keys).where(keys.c.id == key_id).with_for_update()
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise NotFound(f"there is no key {key_id[:40]!r}", param="key_id")
    return _key_of(row)


async def insert(connection: AsyncConnection, key: Key, text: str) -> None:
    """Adds a key to the transaction of `connection`; of its text, the hash alone."""
    values = {**dataclasses.asdict(key), "scopes": list(key.scopes), "models": list(key.models)}
    await connection.execute(sa.insert(keys).values(**values, hash=api_key.hashed(text)))


def _key_of(row: Any) -> Key:
    return Key(
        id=KeyId(row.id),
        tenant_id=TenantId(row.tenant_id),
        name=row.name,
        scopes=tuple(row.scopes),
        models=tuple(row.models),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        replaced_by=row.replaced_by,
    )


def _tenant_part(row: Any, cls: type[Limits] | type[Policy]) -> dict[str, Any]:
    return {field.name: getattr(row, f"tenant_{field.name}") for field in dataclasses.fields(cls)}


def _refuse_ended(key: Key, now: float) -> None:
    if key.revoked_at is not None:
        raise InvalidApiKey("Incorrect API key provided: it was revoked.")
    if key.expires_at is not None and key.expires_at <= now:
        moment = datetime.datetime.fromtimestamp(key.expires_at, datetime.UTC)
        raise InvalidApiKey(f"Incorrect API key provided: it expired at {moment:%F %T} UTC.")


def _check_scopes(scopes: Sequence[str], models: Sequence[str]) -> None:
    for scope in scopes:
        if scope not in SCOPES:
            raise InvalidRequest(
                f"scopes has {scope[:40]!r}; {', '.join(SCOPES)} are known", param="scopes"
            )
    if len(models) > MAX_MODELS:
        raise InvalidRequest(
            f"models has {len(models)} names; at most {MAX_MODELS} are allowed", param="models"
        )


def _check_validity(valid_for_s: float | None) -> None:
    if valid_for_s is not None and not 0 < valid_for_s <= _MAX_VALID_S:
        raise InvalidRequest(
            f"valid_for is {valid_for_s} seconds; it must be above 0 and at most 100 years",
            param="valid_for",
        )
