"""Which identity may call which RPC: the whole table. What is not in it is refused.

Holds while the mesh runs with TLS; without, no caller has an identity, and no server listens beyond
this machine. The public InferenceService is not here: its callers show API keys.
"""

from collections.abc import Mapping

from infermesh.security.identities import Identity

_GATEWAY = frozenset({Identity.GATEWAY})
_SCHEDULER = frozenset({Identity.SCHEDULER})
_OPERATOR = frozenset({Identity.OPERATOR})
_EVERYBODY = frozenset(Identity)

ALLOWED: Mapping[str, frozenset[Identity]] = {
    "/infermesh.v1.AuthService/Authenticate": _GATEWAY | _OPERATOR,
    "/infermesh.v1.AuthService/Lease": _GATEWAY,
    "/infermesh.v1.AuthService/WatchRevocations": _GATEWAY,
    "/infermesh.v1.AuthService/RecordUsage": _GATEWAY,
    "/infermesh.v1.AuthAdminService/CreateTenant": _OPERATOR,
    "/infermesh.v1.AuthAdminService/ListTenants": _OPERATOR,
    "/infermesh.v1.AuthAdminService/UpdateTenant": _OPERATOR,
    "/infermesh.v1.AuthAdminService/CreateKey": _OPERATOR,
    "/infermesh.v1.AuthAdminService/ListKeys": _OPERATOR,
    "/infermesh.v1.AuthAdminService/RotateKey": _OPERATOR,
    "/infermesh.v1.AuthAdminService/RevokeKey": _OPERATOR,
    "/infermesh.v1.AuthAdminService/QueryUsage": _OPERATOR,
    "/infermesh.v1.SemanticCacheService/Lookup": _GATEWAY,
    "/infermesh.v1.SemanticCacheService/Store": _GATEWAY,
    "/infermesh.v1.SemanticCacheService/Embed": _GATEWAY,
    "/infermesh.v1.SemanticCacheService/GetEmbedder": _GATEWAY,
    # the gateway's admin port passes these on
    "/infermesh.v1.SemanticCacheAdminService/Invalidate": _GATEWAY | _OPERATOR,
    "/infermesh.v1.SemanticCacheAdminService/ReportBadHit": _GATEWAY | _OPERATOR,
    "/infermesh.v1.SemanticCacheAdminService/GetStats": _OPERATOR,
    "/infermesh.v1.SchedulerService/Session": _GATEWAY,
    "/infermesh.v1.SchedulerService/WatchReplica": _GATEWAY | _OPERATOR,
    "/infermesh.v1.SchedulerService/GetModel": _GATEWAY,
    "/infermesh.v1.SchedulerService/Drain": _OPERATOR,
    "/infermesh.v1.ShardService/Describe": _SCHEDULER,
    "/infermesh.v1.ShardService/Load": _SCHEDULER,
    "/infermesh.v1.ShardService/Execute": _SCHEDULER,
    # Whoever belongs to the mesh may ask whether a peer is well.
    "/grpc.health.v1.Health/Check": _EVERYBODY,
    "/grpc.health.v1.Health/Watch": _EVERYBODY,
    # These show every method and every connection.
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _OPERATOR,
    "/grpc.channelz.v1.Channelz/GetTopChannels": _OPERATOR,
    "/grpc.channelz.v1.Channelz/GetServers": _OPERATOR,
    "/grpc.channelz.v1.Channelz/GetServer": _OPERATOR,
    "/grpc.channelz.v1.Channelz/GetServerSockets": _OPERATOR,
    "/grpc.channelz.v1.Channelz/GetChannel": _OPERATOR,
    "/grpc.channelz.v1.Channelz/GetSubchannel": _OPERATOR,
    "/grpc.channelz.v1.Channelz/GetSocket": _OPERATOR,
}


def may_call(identity: Identity | None, method: str) -> bool:
    """Whether a caller may call `/package.Service/Method`; one without an identity may nothing."""
    return identity in ALLOWED.get(method, frozenset())
