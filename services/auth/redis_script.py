"""What a script of Redis is asked and how its reply reads; the script itself is redis_quota.lua.

Pure: connections are `redis_connection`'s. Numbers travel as text, which keeps all of their digits.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infermesh.quota import Amounts, Limits
from services.auth import quota
from services.auth.quota import Tally
from services.auth.values import Gateway, Report, TenantId

SOURCE = Path(__file__).with_name("redis_quota.lua").read_text(encoding="utf-8")
# Beyond the longest window, a month; each report begins it again.
KEEP_S = 40 * 86_400
_PREFIX = "infermesh:quota"
_DAY_S = 86_400

Cells = Mapping[int, tuple[int, int]]


def tenant_key(tenant_id: TenantId) -> str:
    """Where a tenant's quota is; all of one tenant's keys are in one slot of Redis Cluster."""
    return f"{_PREFIX}:{{{tenant_id}}}"


def gateway_key(gateway_id: str) -> str:
    """Where a gateway's tenants are, each with the incarnation that leased last."""
    return f"{_PREFIX}:gateways:{{{gateway_id}}}"


@dataclass(frozen=True, slots=True)
class Times:
    """How long leases last; `now` in place of the server's clock, for tests."""

    lease_s: float
    max_request_s: float
    now: float | None = None


@dataclass(frozen=True, slots=True)
class Seed:
    """What a tenant whose quota is new to Redis has used already."""

    cells: Cells
    day_tokens: int
    month_tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """A reply.

    Attributes:
        kind: granted; ended: the lease is over; unknown: a seed is needed; unlisted: the gateway's
            list needs this tenant first.
        granted: the lease's total.
        more: what this report got.
        tally, open: the tenant's, afterwards.
    """

    kind: str
    now: float = 0.0
    granted: Amounts = Amounts()  # noqa: RUF009  # a frozen value
    more: Amounts = Amounts()  # noqa: RUF009  # a frozen value
    open: Amounts = Amounts()  # noqa: RUF009  # a frozen value
    tally: Tally = dataclasses.field(default_factory=Tally)


def hello(gateway: Gateway, times: Times) -> str:
    """Ends the leases of a gateway's earlier runs."""
    return _json({"kind": "hello", **_common(gateway, times)})


def report(
    gateway: Gateway,
    report: Report,
    limits: Limits,
    times: Times,
    *,
    is_listed: bool = False,
    seed: tuple[float, Seed] | None = None,
) -> str:
    """Takes in a report and grants.

    Args:
        is_listed: the gateway's list has the tenant.
        seed: used where Redis does not know the tenant, and the time that it was asked for.
    """
    ask: dict[str, Any] = {
        "kind": "report",
        **_common(gateway, times),
        "lease": report.lease_id,
        "limits": {k: v for k, v in dataclasses.asdict(limits).items() if v is not None},
        "closing": report.closing,
        "is_listed": is_listed,
    }
    for name in ("spent", "returned", "needed", "wanted"):
        ask[name] = list(dataclasses.astuple(getattr(report, name)))
    if seed is not None:
        ask["seed"] = _seed(*seed)
    return _json(ask)


def outcome(reply: Sequence[bytes]) -> Outcome:
    """A reply of the script."""
    kind = reply[0].decode()
    if kind == "ended":
        return Outcome(kind)
    now = float(reply[1])
    if kind != "granted":
        return Outcome(kind, now)
    numbers = [int(number) for number in reply[2:]]
    granted, more, held = (Amounts(*numbers[at : at + 3]) for at in (0, 3, 6))
    day, month = quota.calendar(now)
    cells = {numbers[at]: (numbers[at + 1], numbers[at + 2]) for at in range(11, len(numbers), 3)}
    tally = Tally(cells, day, numbers[9], month, numbers[10], now)
    return Outcome(kind, now, granted, more, held, tally)


def _common(gateway: Gateway, times: Times) -> dict[str, Any]:
    common: dict[str, Any] = {
        "gateway": gateway.id,
        "incarnation": gateway.incarnation,
        "lease_s": times.lease_s,
        "max_request_s": times.max_request_s,
        "keep_s": KEEP_S,
    }
    return common if times.now is None else {**common, "now": times.now}


def _seed(at: float, seed: Seed) -> dict[str, Any]:
    # the names of days and months as the script counts them
    year, month = map(int, quota.calendar(at)[1].split("-"))
    return {
        "cells": quota.cells_to_json(seed.cells),
        "day": int(at // _DAY_S),
        "month": 12 * year + month - 1,
        "day_tokens": seed.day_tokens,
        "month_tokens": seed.month_tokens,
    }


def _json(ask: Mapping[str, Any]) -> str:
    return json.dumps(ask, separators=(",", ":"))
