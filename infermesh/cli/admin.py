"""What the commands for keys, tenants and usage share: the mesh's admin socket, spans of time."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import grpc
import typer

from infermesh.config import SecurityConfig, load
from infermesh.errors import AuthUnavailable, InvalidRequest, Unavailable, from_rpc_error
from infermesh.mesh.state import StateFolder
from infermesh.rpc import as_server
from infermesh.security.certificates import channel_credentials
from infermesh.security.identities import Identity
from infermesh.security.posture import Security
from infermesh.v1.auth_admin_service_pb2_grpc import AuthAdminServiceStub

CALL_S = 15.0
_SPAN = re.compile(r"(\d+)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

Address = Annotated[
    str | None,
    typer.Option("--admin", help="unix:/path, host:port; default: this machine's mesh."),
]


@contextmanager
def auth_admin(address: str | None) -> Iterator[AuthAdminServiceStub]:
    """The admin service of an auth service.

    Raises:
        MeshError: no mesh runs here, or the call failed.
    """
    mesh = {} if address else _of_this_machine()
    target = address or str(mesh["auth_admin"])
    try:
        tls_folder = mesh["tls_folder"] if mesh else load().security.tls_folder
        with _channel(target, tls_folder) as channel:
            yield AuthAdminServiceStub(channel)
    except grpc.RpcError as exc:
        error = from_rpc_error(exc)
        if isinstance(error, Unavailable):
            raise AuthUnavailable(f"nothing answers at {target}: {error.message}") from None
        raise error from None


def seconds(text: str, what: str) -> int:
    """`90s`, `15m`, `12h` or `30d` in seconds.

    Raises:
        InvalidRequest: it is none of these.
    """
    found = _SPAN.fullmatch(text)
    if found is None:
        raise InvalidRequest(f"{what} is {text!r}; write it as 90s, 15m, 12h or 30d", param=what)
    return int(found[1]) * _SECONDS[found[2]]


def moment(unix_s: int) -> str:
    """A time of the local zone, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))


def _channel(target: str, tls_folder: str) -> grpc.Channel:
    """In plaintext to what is of this machine alone. Raises ConfigError."""
    security = Security.of(SecurityConfig(tls_folder=tls_folder), Identity.OPERATOR)
    security.check_peers("--admin", [target])
    if security.certificates is None:
        return grpc.insecure_channel(target)
    credentials = channel_credentials(security.certificates.current())
    return grpc.secure_channel(target, credentials, options=as_server(Identity.AUTH))


def _of_this_machine() -> dict[str, Any]:
    mesh: dict[str, Any]
    for mesh in reversed(StateFolder.of_user().running()):
        if mesh.get("auth_admin"):
            return mesh
    raise AuthUnavailable("no mesh with an auth service runs here; `infermesh up` starts one")
