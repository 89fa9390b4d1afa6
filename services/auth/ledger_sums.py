"""What a tenant has used lately, by the ledger: where quota begins when its store knows nothing."""

from __future__ import annotations

import datetime

import sqlalchemy as sa

from services.auth.database import Database
from services.auth.quota import WINDOW_S
from services.auth.redis_script import Seed
from services.auth.schema import usage
from services.auth.values import TenantId

_TOKENS = usage.c.prompt_tokens + usage.c.completion_tokens


class LedgerSums:
    """Reads the table of usage, and only that."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def used(self, tenant_id: TenantId, now: float) -> Seed:
        """The last minute's requests and tokens by second; the tokens of day and month so far.

        Args:
            now: seconds of the Unix epoch.

        Raises:
            AuthUnavailable: the database does not answer.
        """
        midnight = datetime.datetime.fromtimestamp(now, datetime.UTC).replace(
            hour=0, minute=0, second=0, microsecond=0
        )
        finished = usage.c.finished_unix_ms
        of_tenant = usage.c.tenant_id == tenant_id
        second = (finished // 1000).label("second")
        minute = (
            sa.select(second, sa.func.count(), sa.func.sum(_TOKENS))
            .where(of_tenant, finished >= int((now - WINDOW_S) * 1000))
            .group_by(second)
        )
        today = sa.case((finished >= _ms(midnight), _TOKENS), else_=0)
        month = sa.select(sa.func.sum(today), sa.func.sum(_TOKENS)).where(
            of_tenant, finished >= _ms(midnight.replace(day=1))
        )
        cells: dict[int, tuple[int, int]] = {}
        async with self._database.reading() as connection:
            for at, requests, tokens in await connection.execute(minute):
                # a gateway's clock may be ahead of ours
                cell = min(int(at), int(now))
                before = cells.get(cell, (0, 0))
                cells[cell] = (before[0] + int(requests), before[1] + int(tokens))
            day_tokens, month_tokens = (await connection.execute(month)).one()
        return Seed(cells, int(day_tokens or 0), int(month_tokens or 0))


def _ms(moment: datetime.datetime) -> int:
    return int(moment.timestamp() * 1000)
