"""AuthService messages to the gateway's own values and back. Decides nothing."""

from typing import Any

from gateway.auth.account import Grant, State
from gateway.auth.usage import UsageRow
from gateway.identity import Principal
from infermesh.errors import from_detail
from infermesh.quota import amounts_from_pb, amounts_to_pb, limits_from_pb
from infermesh.v1 import auth_service_pb2 as pb

_USAGE_FIELDS = frozenset(pb.UsageRecord.DESCRIPTOR.fields_by_name)


def principal_from_pb(message: pb.Principal) -> Principal:
    """Who a key belongs to."""
    policy = message.policy
    return Principal(
        tenant=message.tenant_id,
        key_id=message.key_id,
        scopes=frozenset(message.scopes),
        models=frozenset(message.models),
        limits=limits_from_pb(message.limits),
        weight=policy.weight or 1.0,
        semantic_cache=policy.semantic_cache,
        reuse_policy=policy.reuse_policy,
    )


def state_to_pb(state: State) -> pb.LeaseState:
    """What a gateway reports of one lease."""
    return pb.LeaseState(
        lease_id=state.lease_id,
        tenant_id=state.tenant,
        spent=amounts_to_pb(state.spent),
        returned=amounts_to_pb(state.returned),
        needed=amounts_to_pb(state.needed),
        wanted=amounts_to_pb(state.wanted),
        least_needed=amounts_to_pb(state.least_needed),
        closing=state.closing,
    )


def grant_from_pb(message: pb.LeaseGrant) -> Grant:
    """The answer to a state."""
    return Grant(
        lease_id=message.lease_id,
        granted=amounts_from_pb(message.granted),
        valid_for_s=seconds_from_pb(message, "valid_for") or 0.0,
        ended=message.ended,
        refused=from_detail(message.refused) if message.HasField("refused") else None,
        remaining=amounts_from_pb(message.remaining),
        requests_reset_s=seconds_from_pb(message, "requests_reset") or 0.0,
        tokens_reset_s=seconds_from_pb(message, "tokens_reset") or 0.0,
    )


def usage_to_pb(row: UsageRow) -> pb.RecordUsageRequest:
    """One row for the ledger; what only a later version writes into its rows is left out."""
    facts: dict[str, Any] = {name: row[name] for name in row if name in _USAGE_FIELDS}  # type: ignore[literal-required]  # names of its own
    return pb.RecordUsageRequest(record=pb.UsageRecord(**facts))


def seconds_from_pb(message: Any, field: str) -> float | None:
    """An optional duration of a message; None where it is absent."""
    if not message.HasField(field):
        return None
    seconds: float = getattr(message, field).ToTimedelta().total_seconds()
    return seconds
