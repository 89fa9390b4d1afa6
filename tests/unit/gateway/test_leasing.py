"""Leases while the auth service takes reports and answers none."""

import asyncio
from typing import Any

import pytest

from gateway.auth import lease_stream, leasing
from gateway.auth.account import Account, Grant
from gateway.auth.instances import Picker
from gateway.auth.leasing import LeaseKeeper
from gateway.identity import Principal
from infermesh.quota import NOTHING, Amounts

ACME = Principal("acme")


class SilentCall:
    """Takes what is written."""

    async def write(self, message: Any) -> None: ...

    async def read(self) -> Any:
        await asyncio.Event().wait()

    def cancel(self) -> None: ...


class SilentAuth:
    """A frozen auth service; `enough` is set when it was called often enough."""

    def __init__(self, num_calls: int) -> None:
        self._left = num_calls
        self.enough = asyncio.Event()

    def Lease(self) -> SilentCall:
        self._left -= 1
        if self._left == 0:
            self.enough.set()
        return SilentCall()


async def test_quota_in_hand_stays_when_reports_get_no_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lease_stream, "ANSWER_S", 0.02)
    monkeypatch.setattr(leasing, "REPORT_S", 0.0)
    monkeypatch.setattr(leasing, "_RETRY_S", 0.0)
    auth = SilentAuth(5)
    keeper = LeaseKeeper(Picker([auth]), "gateway", lambda: 1.0)  # type: ignore[arg-type]
    account: Account = keeper._tenant(ACME).account
    account.apply(Grant("l", Amounts(tokens=1000), 20.0, False, None, NOTHING, 0.0, 0.0), 0.0)
    cost = Amounts(tokens=10)
    assert account.reserve(cost, 1.0)
    account.settle(cost, 10)
    running = asyncio.ensure_future(keeper.run())
    async with asyncio.timeout(10):
        await auth.enough.wait()
    running.cancel()
    assert keeper._tenant(ACME).account is account
    assert account.available(1.0).tokens >= 50
