"""One gateway with hundreds of busy tenants, before a real auth service whose disk is slow."""

import asyncio
import time
from pathlib import Path

import pytest

from gateway.auth import lease_stream
from gateway.auth.account import Account
from gateway.auth.instances import Picker
from gateway.auth.leasing import LeaseKeeper
from gateway.auth.tenant_quota import Hold
from gateway.identity import Principal
from infermesh.quota import Limits
from services.auth.leases import Leases
from services.auth.values import Gateway, Grant, Report
from tests.auth_process import running_auth

NUM_TENANTS = 300
COMMIT_S = 0.005
# Enough for one message by far, too little for all tenants.
ANSWER_S = 1.2
LIMITS = Limits(tokens_per_minute=1000)


def principal(number: int) -> Principal:
    return Principal(f"tenant-{number}", "k", frozenset(), frozenset(), limits=LIMITS)


@pytest.mark.slow
async def test_every_tenant_keeps_its_lease_when_hundreds_are_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert NUM_TENANTS * COMMIT_S > ANSWER_S
    commit = Leases.report

    async def slowly(self: Leases, gateway: Gateway, report: Report) -> Grant:
        await asyncio.sleep(COMMIT_S)  # the disk
        return await commit(self, gateway, report)

    monkeypatch.setattr(Leases, "report", slowly)
    monkeypatch.setattr(lease_stream, "ANSWER_S", ANSWER_S)
    async with running_auth(tmp_path, f"sqlite:///{tmp_path}/auth.sqlite3") as auth:
        for number in range(NUM_TENANTS):
            await auth.tenant(f"tenant-{number}", tokens_per_minute=1000)
        keeper = LeaseKeeper(Picker([auth.stub]), "gateway", time.monotonic)
        reporting = asyncio.ensure_future(keeper.run())
        holds: list[Hold | None] = []
        try:
            for start in range(0, NUM_TENANTS, 20):
                # requests run on: their tenants stay busy
                group = range(start, start + 20)
                holds += await asyncio.gather(*(keeper.reserve(principal(i), 10) for i in group))
            first = [_until(hold) for hold in holds]
            async with asyncio.timeout(60):
                while True:
                    if all(_until(hold) > until for hold, until in zip(holds, first, strict=True)):
                        break
                    await asyncio.sleep(0.05)  # a poll of what another task does
        finally:
            reporting.cancel()
        for number, hold in enumerate(holds):
            found = keeper.last_grant(f"tenant-{number}")
            assert found is not None
            assert hold is not None
            assert found[0].lease_id == hold.account.lease_id, "it was given up for a new one"


def _until(hold: Hold | None) -> float:
    assert hold is not None
    assert isinstance(hold.account, Account)
    return hold.account.usable_until
