"""Between the auth services' protobuf messages and their own types. Decides nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration

from infermesh.errors import InvalidRequest, to_detail
from infermesh.quota import amounts_from_pb, amounts_to_pb, limits_to_pb
from infermesh.v1 import auth_admin_service_pb2 as admin_pb
from infermesh.v1 import auth_service_pb2 as pb
from services.auth import api_key
from services.auth.keys import Verified
from services.auth.prices import amount
from services.auth.values import (
    Dimension,
    Grant,
    Key,
    KeyId,
    LeaseId,
    Policy,
    Report,
    Tenant,
    TenantId,
    UsageQuery,
    UsageRow,
    UsageTotal,
)

_MAX_LABELS, _MAX_LABEL_NAME, _MAX_LABEL_VALUE = 16, 64, 512
_DIMENSIONS: dict[int, Dimension] = {
    admin_pb.USAGE_DIMENSION_TENANT: Dimension.TENANT,
    admin_pb.USAGE_DIMENSION_KEY: Dimension.KEY,
    admin_pb.USAGE_DIMENSION_MODEL: Dimension.MODEL,
    admin_pb.USAGE_DIMENSION_USER: Dimension.USER,
    admin_pb.USAGE_DIMENSION_DAY: Dimension.DAY,
    admin_pb.USAGE_DIMENSION_LABEL: Dimension.LABEL,
}


def policy_from_pb(message: pb.TenantPolicy) -> Policy:
    return Policy(message.weight or 1.0, message.semantic_cache, message.reuse_policy)


def policy_to_pb(policy: Policy) -> pb.TenantPolicy:
    return pb.TenantPolicy(**dataclasses.asdict(policy))


def verified_to_pb(verified: Verified) -> pb.AuthenticateResponse:
    key = verified.key
    principal = pb.Principal(
        tenant_id=key.tenant_id,
        key_id=key.id,
        scopes=key.scopes,
        models=key.models,
        limits=limits_to_pb(verified.limits),
        policy=policy_to_pb(verified.policy),
    )
    if verified.valid_for_s is not None:
        principal.valid_for.CopyFrom(duration(verified.valid_for_s))
    return pb.AuthenticateResponse(principal=principal, sequence=verified.sequence)


def tenant_to_pb(tenant: Tenant) -> admin_pb.Tenant:
    return admin_pb.Tenant(
        id=tenant.id,
        name=tenant.name,
        limits=limits_to_pb(tenant.limits),
        policy=policy_to_pb(tenant.policy),
        created_unix_s=tenant.created_at,
    )


def key_to_pb(key: Key) -> admin_pb.Key:
    return admin_pb.Key(
        id=key.id,
        tenant_id=key.tenant_id,
        name=key.name,
        prefix=api_key.prefix(key.id),
        scopes=key.scopes,
        models=key.models,
        created_unix_s=key.created_at,
        expires_unix_s=key.expires_at,
        revoked_unix_s=key.revoked_at,
        replaced_by=key.replaced_by or "",
    )


def report_from_pb(message: pb.LeaseState) -> Report:
    """Raises InvalidRequest where an id is missing or too long."""
    for name in ("lease_id", "tenant_id"):
        value = getattr(message, name)
        if not 1 <= len(value) <= 64:
            raise InvalidRequest(
                f"{name} has {len(value)} characters; 1 to 64 are allowed", param=name
            )
    return Report(
        lease_id=LeaseId(message.lease_id),
        tenant_id=TenantId(message.tenant_id),
        spent=amounts_from_pb(message.spent),
        returned=amounts_from_pb(message.returned),
        needed=amounts_from_pb(message.needed),
        wanted=amounts_from_pb(message.wanted),
        least_needed=amounts_from_pb(message.least_needed),
        closing=message.closing,
    )


def grant_to_pb(grant: Grant) -> pb.LeaseGrant:
    reset = duration(grant.reset_s)
    return pb.LeaseGrant(
        lease_id=grant.lease_id,
        granted=amounts_to_pb(grant.granted),
        valid_for=duration(grant.valid_for_s),
        ended=grant.ended,
        refused=None if grant.refused is None else to_detail(grant.refused),
        remaining=amounts_to_pb(grant.remaining),
        requests_reset=reset,
        tokens_reset=reset,
    )


def usage_from_pb(message: pb.UsageRecord) -> UsageRow:
    """Raises InvalidRequest where the record has no id."""
    if not 1 <= len(message.record_id) <= 64:
        raise InvalidRequest(
            f"record_id has {len(message.record_id)} characters; 1 to 64 are allowed",
            param="record_id",
        )
    return UsageRow(
        record_id=message.record_id,
        request_id=message.request_id[:128],
        tenant_id=TenantId(message.tenant_id[:64]),
        key_id=KeyId(message.key_id[:32]),
        model=message.model[:256],
        endpoint=message.endpoint[:64],
        status=message.status[:16],
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_prompt_tokens=message.cached_prompt_tokens,
        finished_unix_ms=message.finished_unix_ms,
        end_user=message.end_user[:256],
        labels=_bounded(message.labels),
        finish_reason=message.finish_reason[:64],
        cache=message.cache[:16],
        device_us=message.device_us,
    )


def _bounded(labels: Mapping[str, str]) -> dict[str, str]:
    """Gateways refuse what is longer; in order, so that equal labels are equal text."""
    kept = sorted(labels.items())[:_MAX_LABELS]
    return {name[:_MAX_LABEL_NAME]: value[:_MAX_LABEL_VALUE] for name, value in kept}


def query_from_pb(message: admin_pb.QueryUsageRequest) -> UsageQuery:
    """Raises InvalidRequest for a dimension that is unknown, or a label without a name."""
    by = tuple(dict.fromkeys(message.group_by))
    for number in by:
        if number not in _DIMENSIONS:
            raise InvalidRequest(f"group_by has {number}; 1 to 6 are known", param="group_by")
    if (admin_pb.USAGE_DIMENSION_LABEL in by) != bool(message.label) or '"' in message.label:
        raise InvalidRequest(
            "label must be given with USAGE_DIMENSION_LABEL, and only then; it has no quotes",
            param="label",
        )
    return UsageQuery(
        tenant_id=message.tenant_id,
        since_unix_ms=message.since_unix_ms if message.HasField("since_unix_ms") else None,
        until_unix_ms=message.until_unix_ms if message.HasField("until_unix_ms") else None,
        by=tuple(_DIMENSIONS[number] for number in by) or UsageQuery().by,
        label=message.label,
    )


def total_to_pb(total: UsageTotal) -> admin_pb.UsageTotal:
    facts = dataclasses.asdict(total)
    return admin_pb.UsageTotal(cost=amount(facts.pop("cost_nano")), **facts)


def duration(seconds: float) -> Duration:
    """A protobuf duration."""
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def seconds_from_pb(message: Any, field: str) -> float | None:
    """An optional duration of a message; None where it is absent."""
    if not message.HasField(field):
        return None
    seconds: float = getattr(message, field).ToTimedelta().total_seconds()
    return seconds
