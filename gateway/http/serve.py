"""uvicorn inside the service's own event loop: sockets bound up front, signals left alone."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from infermesh.sockets import bind

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
