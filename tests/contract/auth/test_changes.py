"""The feed of changes while its database can't be read."""

from pathlib import Path

import pytest

from infermesh.errors import AuthUnavailable
from services.auth import changes
from services.auth.changes import ChangeFeed
from services.auth.database import Database
from services.auth.migrate import migrate


async def test_feed_is_unavailable_when_it_was_not_read_lately(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(f"sqlite:///{tmp_path}/auth.sqlite3")
    await migrate(database)
    feed = ChangeFeed(database, lambda: 0.0)
    await feed.start()
    monkeypatch.setattr(changes, "STALE_S", 0.001)
    with pytest.raises(AuthUnavailable):
        assert await anext(feed.follow(0, 0.05)) != []  # nothing polls
    await database.close()
