"""Listening sockets from addresses as the settings write them: `host:port`, `unix:/path`, or
`fd://N`, a socket that whoever started the process holds and hands down.
"""

import contextlib
import errno
import os
import socket

from infermesh.config_fields import ConfigError

_INHERITED = "fd://"


def bind(setting: str, address: str) -> tuple[socket.socket, str]:
    """A bound socket and its address, the port chosen where it was 0.

    Raises:
        ConfigError: it is in use, or is none of this machine's.
    """
    host, _, port = address.rpartition(":")
    try:
        if address.startswith(_INHERITED):
            inherited = _inherited(address)
            return inherited, _name(inherited)
        if address.startswith("unix:"):
            return _bind_unix(address.removeprefix("unix:")), address
        return _bind_tcp(host.strip("[]"), int(port))
    except (OSError, ValueError, OverflowError) as exc:
        if isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE:
            raise ConfigError(f"{setting}: port {port} on {host} is in use") from None
        raise ConfigError(f"{setting} is {address}, which can't be bound: {exc}") from None


def named(address: str) -> str:
    """An address with what `fd://N` stands for in its place.

    Raises:
        ConfigError: the process has no such socket.
    """
    if not address.startswith(_INHERITED):
        return address
    try:
        inherited = _inherited(address)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{address} is no socket of this process: {exc}") from None
    try:
        return _name(inherited)
    finally:
        inherited.detach()


def join(host: str, port: int | str) -> str:
    """`host:port`, an IPv6 host in brackets."""
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def _inherited(address: str) -> socket.socket:
    return socket.socket(fileno=int(address.removeprefix(_INHERITED)))


def _name(bound: socket.socket) -> str:
    where = bound.getsockname()
    return join(where[0], where[1]) if isinstance(where, tuple) else f"unix:{where}"


def _bind_tcp(host: str, port: int) -> tuple[socket.socket, str]:
    is_v6 = ":" in host
    bound = socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    return bound, join(host, bound.getsockname()[1])


def _bind_unix(path: str) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # left by a process that was killed
    try:
        bound.bind(path)
        os.chmod(path, 0o600)
    except BaseException:
        bound.close()
        raise
    return bound
