"""Who waits for an auth service that takes questions and answers none."""

import asyncio
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

import pytest

from gateway.auth import verifier
from gateway.auth.instances import Picker
from gateway.auth.principals import PrincipalCache, digest
from gateway.auth.verifier import Verifier
from gateway.identity import LOCAL
from infermesh.errors import AuthUnavailable


class SilentAuth:
    """`asked` is set once it was asked."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.num_questions = 0

    async def Authenticate(self, request: Any, timeout: float, metadata: Any) -> Any:
        self.num_questions += 1
        self.asked.set()
        await asyncio.Event().wait()


def make(auth: SilentAuth, times: Iterator[float]) -> tuple[Verifier, PrincipalCache]:
    cache = PrincipalCache(60.0, 600.0, lambda: next(times))
    return Verifier(Picker([auth]), cache, lambda tenant: None), cache  # type: ignore[arg-type]


async def test_a_known_key_does_not_wait_where_somebody_asks_for_it() -> None:
    auth = SilentAuth()
    # verified at 0; at 100 that is too long ago, and still within the outage allowance
    checks, cache = make(auth, chain([0.0, 0.0], repeat(100.0)))
    cache.put(digest("key"), LOCAL, None, 0)
    first = asyncio.create_task(checks.identify("key"))
    await auth.asked.wait()
    assert await checks.identify("key") is LOCAL
    assert auth.num_questions == 1
    assert not first.done()
    first.cancel()


async def test_all_who_wait_for_an_unknown_key_give_up_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verifier, "PATIENCE_S", 0.05)
    auth = SilentAuth()
    checks, _ = make(auth, repeat(0.0))
    waiting = [checks.identify("key") for _ in range(20)]
    async with asyncio.timeout(1.0):  # one after another it would be 20 times the patience
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(outcome, AuthUnavailable) for outcome in outcomes)
    assert not checks._asking
