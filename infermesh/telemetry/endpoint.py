"""The metrics port of a service: /metrics for Prometheus, /healthz and /readyz for probes.

Answers from a thread of its own, so that it can say that the event loop hangs.
"""

import http.server
import socket
import socketserver
import threading
from http import HTTPStatus

from infermesh.sockets import join
from infermesh.telemetry import metrics
from infermesh.telemetry.vitals import PROCESS, Vitals

_TEXT = "text/plain; charset=utf-8"
_PATIENCE_S = 10.0


def serve(address: str, vitals: Vitals = PROCESS) -> str:
    """Serves on host:port; the bound address, or "" where `address` is empty.

    Raises:
        OSError: the address can't be bound.
    """
    if not address:
        return ""
    host, _, port = address.rpartition(":")

    handler = type("Handler", (_Handler,), {"vitals": vitals})
    kind = _ServerV6 if ":" in host else _Server
    server = kind((host.strip("[]"), int(port)), handler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return join(host, server.server_port)


class _Server(http.server.ThreadingHTTPServer):
    def server_bind(self) -> None:
        """Without the parent's question to a name server, which may be out of reach."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]  # typeshed: a name may be bytes


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Handler(http.server.BaseHTTPRequestHandler):
    vitals: Vitals
    timeout = _PATIENCE_S  # a client that says nothing holds a thread no longer

    def do_GET(self) -> None:  # the standard library's name
        path = self.path.partition("?")[0]
        if path == "/metrics":
            body, content_type = metrics.exposition()
            self._answer(HTTPStatus.OK, body, content_type)
        elif path == "/healthz":
            self._say(self.vitals.is_alive, "ok")
        elif path == "/readyz":
            self._say(self.vitals.is_ready, "ready")
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"not found\n", _TEXT)

    def _say(self, is_true: bool, word: str) -> None:
        status = HTTPStatus.OK if is_true else HTTPStatus.SERVICE_UNAVAILABLE
        self._answer(status, f"{word if is_true else f'not {word}'}\n".encode(), _TEXT)

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: probes would fill the log."""
