"""The first key of an installation: its text comes from a file, so that a Secret can hold it.

What is known already stays as it is: a key that was revoked is not revived, limits that were set
are not reset.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa

from infermesh.config import ConfigError
from infermesh.quota import Limits
from services.auth import api_key, keys, migrate, tenants
from services.auth.database import Database
from services.auth.schema import keys as keys_table
from services.auth.schema import tenants as tenants_table
from services.auth.values import SCOPES, Key, Policy, Tenant, TenantId

# What the command line takes where no tenant is named.
TENANT = TenantId("local")
_SETTING = "auth.first_key_file"


async def ensure(database: Database, file: Path, clock: Callable[[], float]) -> None:
    """Makes the key known, and its tenant, where they are not.

    Raises:
        ConfigError: the file can't be read, or holds no key.
        AuthUnavailable: the database does not answer.
    """
    text = _read(file)
    key_id = api_key.id_of(text)
    if key_id is None:
        raise ConfigError(
            f"{_SETTING} is {file}, which holds no key: im-, 12 characters, -, and 52 more, "
            "all of them from a to z and 2 to 7"
        )
    key = Key(
        id=key_id,
        tenant_id=TENANT,
        name="first key",
        scopes=SCOPES,
        models=(),
        created_at=int(clock()),
    )
    async with database.writing() as connection:
        await migrate.lock(database, connection)
        known = sa.select(tenants_table.c.id).where(tenants_table.c.id == TENANT)
        if (await connection.execute(known)).first() is None:
            tenant = Tenant(TENANT, "First tenant", Limits(), Policy(), int(clock()))
            await tenants.insert(connection, tenant)
        taken = sa.select(keys_table.c.hash).where(keys_table.c.id == key_id)
        row = (await connection.execute(taken)).first()
        if row is None:
            await keys.insert(connection, key, text)
        elif not api_key.matches(text, row.hash):
            raise ConfigError(f"{_SETTING} is {file}, whose key has the id of another key")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{_SETTING} is {file}, which can't be read: {error}") from None
