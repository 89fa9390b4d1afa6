"""What the commands for keys, tenants and usage share: the mesh's admin socket, spans of time."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import grpc
import typer

from infermesh.errors import AuthUnavailable, InvalidRequest, Unavailable, from_rpc_error
from infermesh.mesh.state import StateFolder
from infermesh.v1.auth_admin_service_pb2_grpc import AuthAdminServiceStub

CALL_S = 15.0
_SPAN = re.compile(r"(\d+)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

Address = Annotated[
    str | None, typer.Option("--admin", help="unix:/path; default: the mesh of this machine.")
]


@contextmanager
def auth_admin(address: str | None) -> Iterator[AuthAdminServiceStub]:
    """The admin service of an auth service.

    Raises:
        MeshError: no mesh runs here, or the call failed.
    """
    target = address or _of_this_machine()
    try:
        with grpc.insecure_channel(target) as channel:
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


def _of_this_machine() -> str:
    for mesh in reversed(StateFolder.of_user().running()):
        if mesh.get("auth_admin"):
            return str(mesh["auth_admin"])
    raise AuthUnavailable("no mesh with an auth service runs here; `infermesh up` starts one")
