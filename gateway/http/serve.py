"""uvicorn inside the service's own event loop: sockets bound up front, signals left alone."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from infermesh.config import ConfigError

# Longer than clients keep an idle connection, so that none is closed under a request.
_KEEP_ALIVE_S = 75


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.running = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.running.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the lifecycle owns them


class HttpServer:
    """One application on one address.

    Args:
        setting: the address's name in messages.
    """

    def __init__(self, app: ASGIApp, setting: str, address: str) -> None:
        self._socket, self.address = bind(setting, address)
        self._server = _Server(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
            )
        )

    async def run(self) -> None:
        """Serves until told to stop."""
        await self._server.serve(sockets=[self._socket])

    async def started(self) -> None:
        """Returns once connections are answered."""
        await self._server.running.wait()

    def stop(self) -> None:
        """Closes the listener and idle connections; `run` returns soon after."""
        self._server.should_exit = True
        self._server.force_exit = True

    def close(self) -> None:
        """Gives the address back, also where `run` never began."""
        self._socket.close()


def bind(setting: str, address: str) -> tuple[socket.socket, str]:
    """A bound socket and its address, the port chosen where it was 0.

    Raises:
        ConfigError: it is in use, or is none of this machine's.
    """
    try:
        if address.startswith("unix:"):
            return _bind_unix(address.removeprefix("unix:")), address
        host, _, port = address.rpartition(":")
        return _bind_tcp(host.strip("[]"), int(port))
    except (OSError, ValueError, OverflowError) as exc:
        raise ConfigError(f"{setting} is {address}, which can't be bound: {exc}") from None


def _bind_tcp(host: str, port: int) -> tuple[socket.socket, str]:
    is_v6 = ":" in host
    bound = socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    number = bound.getsockname()[1]
    return bound, f"[{host}]:{number}" if is_v6 else f"{host}:{number}"


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
