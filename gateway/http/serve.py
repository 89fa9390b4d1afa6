"""uvicorn inside the service's own event loop: sockets bound up front, signals left alone."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infermesh.sockets import bind

# Longer than clients keep an idle connection, so that none is closed under a request.
_KEEP_ALIVE_S = 75
_POLL_S = 0.02


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
        self._app = app
        self._handing_over = False
        self._server = _Server(
            uvicorn.Config(
                self._serve,
                interface="asgi3",
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

    async def hand_over(self, timeout_s: float) -> None:
        """Takes no new connection. Those that are open may ask once more for a while, each answer
        is its connection's last; then idle ones are closed, and others after their answer.
        """
        self._handing_over = True
        for listener in self._server.servers:
            listener.close()
        open_ones = self._server.server_state.connections
        try:
            async with asyncio.timeout(timeout_s):
                while open_ones:  # noqa: ASYNC110  # uvicorn has no event for it
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            for connection in list(open_ones):
                connection.shutdown()

    def stop(self) -> None:
        """Closes the listener and idle connections; `run` returns soon after."""
        self._server.should_exit = True
        self._server.force_exit = True

    def close(self) -> None:
        """Gives the address back, also where `run` never began."""
        self._socket.close()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start" and self._handing_over:
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self._app(scope, receive, send_last)
