"""What a tenant has used lately, by the ledger: where quota begins when its store knows nothing.

Counts rows, and the days that `retention` has rolled up.
"""

from __future__ import annotations

import datetime

import sqlalchemy as sa

from services.auth.database import Database
from services.auth.quota import WINDOW_S
from services.auth.redis_script import Seed
from services.auth.retention import DAY_MS
from services.auth.schema import usage, usage_days
from services.auth.values import TenantId

_TOKENS = usage.c.prompt_tokens + usage.c.completion_tokens
_DAY_TOKENS = usage_days.c.prompt_tokens + usage_days.c.completion_tokens
_EPOCH = datetime.date(1970, 1, 1)


class LedgerSums:
    """Reads the tables of usage, and only those."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def used(self, tenant_id: TenantId, now: float) -> Seed:
        """The last minute's requests and tokens by second; the tokens of day and month so far.

        Args:
            now: seconds of the Unix epoch.

        Raises:
            AuthUnavailable: the database does not answer.
        """
        cells: dict[int, tuple[int, int]] = {}
        async with self._database.reading() as connection:
            for at, requests, tokens in await connection.execute(_last_minute(tenant_id, now)):
                # a gateway's clock may be ahead of ours
                cell = min(int(at), int(now))
                before = cells.get(cell, (0, 0))
                cells[cell] = (before[0] + int(requests), before[1] + int(tokens))
            sums = (await connection.execute(_day_and_month(tenant_id, now))).one()
        return Seed(cells, *(int(tokens or 0) for tokens in sums))


def _last_minute(tenant_id: TenantId, now: float) -> sa.Select[int, int, int]:
    """Its requests and tokens by second: of rows alone, for no day is rolled up before it ends."""
    finished = usage.c.finished_unix_ms
    second = (finished // 1000).label("second")
    found = sa.select(second, sa.func.count(), sa.func.sum(_TOKENS))
    since_ms = int((now - WINDOW_S) * 1000)
    return found.where(usage.c.tenant_id == tenant_id, finished >= since_ms).group_by(second)


def _day_and_month(tenant_id: TenantId, now: float) -> sa.Select[int, int]:
    """Their tokens so far. One statement, so that no row is in its day's sums and by itself."""
    first = datetime.datetime.fromtimestamp(now, datetime.UTC).date().replace(day=1)
    first_day = (first - _EPOCH).days
    finished = usage.c.finished_unix_ms
    rows = sa.select((finished // DAY_MS).label("day"), _TOKENS.label("tokens")).where(
        usage.c.tenant_id == tenant_id, finished >= first_day * DAY_MS
    )
    days = sa.select(usage_days.c.day, _DAY_TOKENS).where(
        usage_days.c.tenant_id == tenant_id, usage_days.c.day >= first_day
    )
    used = sa.union_all(rows, days).subquery()
    today = sa.case((used.c.day >= int(now * 1000) // DAY_MS, used.c.tokens), else_=0)
    return sa.select(sa.func.sum(today), sa.func.sum(used.c.tokens))
