"""What the auth service speaks of: tenants, keys, usage. Values only.

Times are seconds of the Unix epoch, unless a name says otherwise.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NewType

from infermesh.errors import MeshError
from infermesh.quota import NOTHING, Amounts, Limits

TenantId = NewType("TenantId", str)
KeyId = NewType("KeyId", str)
LeaseId = NewType("LeaseId", str)

SCOPES = ("inference", "embeddings", "models")
REUSE_POLICIES = ("", "greedy", "unset", "all", "never")


@dataclass(frozen=True, slots=True)
class Policy:
    """How a tenant's requests are scheduled and its answers reused."""

    weight: float = 1.0
    semantic_cache: bool = False
    reuse_policy: str = ""


@dataclass(frozen=True, slots=True)
class Tenant:
    """One customer."""

    id: TenantId
    name: str
    limits: Limits
    policy: Policy
    created_at: int


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its secret."""

    id: KeyId
    tenant_id: TenantId
    name: str
    scopes: tuple[str, ...]
    models: tuple[str, ...]
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None
    replaced_by: KeyId | None = None


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What one request cost; `record_id` was drawn by the gateway and is unique."""

    record_id: str
    request_id: str
    tenant_id: TenantId
    key_id: KeyId
    model: str
    endpoint: str
    status: str
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    finished_unix_ms: int
    end_user: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    finish_reason: str = ""
    cache: str = ""
    device_us: int = 0


class Dimension(enum.Enum):
    """What the ledger's sums are made by."""

    TENANT = "tenant_id"
    KEY = "key_id"
    MODEL = "model"
    USER = "end_user"
    DAY = "day"
    LABEL = "label_value"


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Which sums are asked for.

    Attributes:
        tenant_id: empty: of all tenants.
        label: whose values `Dimension.LABEL` means.
    """

    tenant_id: str = ""
    since_unix_ms: int | None = None
    until_unix_ms: int | None = None
    by: tuple[Dimension, ...] = (Dimension.TENANT, Dimension.KEY, Dimension.MODEL)
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageTotal:
    """One sum of the ledger; what it is not made by is empty.

    Attributes:
        day: of UTC, as 2026-11-29.
        currency: empty: there was no price.
    """

    tenant_id: str = ""
    key_id: str = ""
    model: str = ""
    end_user: str = ""
    day: str = ""
    label_value: str = ""
    num_requests: int
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    device_us: int
    cost_nano: int
    currency: str


@dataclass(frozen=True, slots=True)
class Gateway:
    """One run of a gateway process."""

    id: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class Report:
    """A lease as its gateway sees it; `spent` and `returned` are totals since it began."""

    lease_id: LeaseId
    tenant_id: TenantId
    spent: Amounts
    returned: Amounts
    needed: Amounts = NOTHING
    wanted: Amounts = NOTHING
    least_needed: Amounts = NOTHING
    closing: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """The answer to a report; `granted` is the total since the lease began."""

    lease_id: LeaseId
    granted: Amounts = NOTHING
    valid_for_s: float = 0.0
    ended: bool = False
    refused: MeshError | None = None
    remaining: Amounts = NOTHING
    reset_s: float = 0.0
