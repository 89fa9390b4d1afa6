"""The identities of a mesh and how a certificate names them. Knows nothing of who may do what.

A certificate carries two names: a SPIFFE id (https://github.com/spiffe/spiffe/blob/main/standards),
by which a server knows its caller, and a DNS name, by which a caller knows the server whatever the
address: gRPC's Python clients check no other kind.
"""

import enum

TRUST_DOMAIN = "infermesh"
SERVER_DOMAIN = "infermesh.internal"


class Identity(enum.StrEnum):
    """Who a process is; `OPERATOR` is a person's command line and the supervisor."""

    GATEWAY = "gateway"
    AUTH = "auth"
    CACHE = "cache"
    SCHEDULER = "scheduler"
    SHARD = "shard"
    OPERATOR = "operator"

    @property
    def spiffe_id(self) -> str:
        """What servers look for in a caller's certificate."""
        return f"spiffe://{TRUST_DOMAIN}/{self.value}"

    @property
    def server_name(self) -> str:
        """What callers look for in a server's certificate."""
        return f"{self.value}.{SERVER_DOMAIN}"


_BY_SPIFFE_ID = {identity.spiffe_id: identity for identity in Identity}


def from_spiffe_id(spiffe_id: str) -> Identity | None:
    """The identity of this mesh that has it."""
    return _BY_SPIFFE_ID.get(spiffe_id)
