"""A replica's state and load as it reports them. Values only."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from gateway.prefix_index import BlockEvents
from gateway.request import Fingerprint, ReplicaId
from infermesh.block_hash import ShortHash
from infermesh.errors import MeshError, from_detail
from infermesh.v1 import scheduler_service_pb2 as pb


class ReplicaState(enum.Enum):
    """What a replica can do."""

    UNREACHABLE = "unreachable"
    LOADING = "loading"
    SERVING = "serving"
    RECOVERING = "recovering"
    DRAINING = "draining"
    FAILED = "failed"


class MoveReason(enum.Enum):
    """Why a replica offers a request to others."""

    DRAINING = "draining"
    DEVICE_LOST = "device_lost"


_STATES = {
    pb.REPLICA_STATE_LOADING: ReplicaState.LOADING,
    pb.REPLICA_STATE_SERVING: ReplicaState.SERVING,
    pb.REPLICA_STATE_RECOVERING: ReplicaState.RECOVERING,
    pb.REPLICA_STATE_DRAINING: ReplicaState.DRAINING,
    pb.REPLICA_STATE_FAILED: ReplicaState.FAILED,
}


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """How busy it was at its last report."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    num_tokens_waiting: int = 0
    kv_cache_usage: float = 0.0


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """The last report."""

    replica_id: ReplicaId
    state: ReplicaState = ReplicaState.UNREACHABLE
    model_id: str | None = None
    fingerprint: Fingerprint | None = None
    load: ReplicaLoad = ReplicaLoad()
    load_progress: float = 0.0
    load_stage: str = ""
    error: MeshError | None = None
    # None: it is too old to say.
    version: str | None = None


def view_from_pb(message: pb.WatchReplicaResponse) -> ReplicaView:
    """One report."""
    load = message.load
    return ReplicaView(
        replica_id=ReplicaId(message.replica_id),
        state=_STATES.get(message.state, ReplicaState.UNREACHABLE),
        model_id=message.model_id or None,
        fingerprint=Fingerprint(message.model_fingerprint) if message.model_fingerprint else None,
        load=ReplicaLoad(
            num_requests_running=load.num_requests_running,
            num_requests_waiting=load.num_requests_waiting,
            num_tokens_waiting=load.num_tokens_waiting,
            kv_cache_usage=load.kv_cache_usage,
        ),
        load_progress=message.load_progress,
        load_stage=message.load_stage,
        error=from_detail(message.error) if message.HasField("error") else None,
        version=message.version or None,
    )


def block_events_from_pb(message: pb.BlockEvents) -> BlockEvents:
    """What one report says of the prefix cache."""
    return BlockEvents(
        sequence=message.sequence,
        is_snapshot=message.is_snapshot,
        stored=cast("Sequence[ShortHash]", list(message.stored)),
        removed=cast("Sequence[ShortHash]", list(message.removed)),
        block_size=message.block_size,
    )
