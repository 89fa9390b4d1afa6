"""What the setting of the database may be, and what is said of it where it can't be used."""

import pytest

from infermesh.config import ConfigError
from services.auth.database import async_url


@pytest.mark.parametrize("text", ["postgresql://ann:secret@host:port/auth", "ann:secret@host"])
def test_bad_url_is_refused_without_its_password(text: str) -> None:
    with pytest.raises(ConfigError, match=r"auth\.database_url") as caught:
        async_url(text)
    assert "secret" not in str(caught.value)


def test_postgres_is_short_for_postgresql() -> None:
    assert async_url("postgres://ann@host/auth").drivername == "postgresql+asyncpg"
