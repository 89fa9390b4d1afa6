"""A guarded server with every RPC of the protos, and every way of calling one."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

import infermesh.v1
from infermesh import rpc
from infermesh.security.certificates import channel_credentials
from infermesh.security.identities import Identity
from tests import certificates

PUBLIC = "infermesh.v1.InferenceService"
# Its certificate is this one's.
SERVER = Identity.SCHEDULER
CALL_S = 10.0


@dataclass(frozen=True)
class Rpc:
    """One method, as a descriptor has it."""

    path: str
    kind: str

    def handler(self) -> Any:
        """Answers with the caller's certificate, once."""

        async def unary(request: Any, context: Any) -> bytes:
            return _certificate(context)

        async def stream(request: Any, context: Any) -> Any:
            yield _certificate(context)
            async for _ in request if self.kind == "stream_stream" else _none():
                yield _certificate(context)

        answer = stream if self.kind.endswith("_stream") else unary
        return getattr(grpc, f"{self.kind}_rpc_method_handler")(answer)

    async def call(self, channel: grpc.aio.Channel) -> bytes:
        """The first answer to an empty request. Raises AioRpcError."""
        method = getattr(channel, self.kind)(self.path)
        if not self.kind.startswith("stream"):
            call = method(b"", timeout=CALL_S)
        else:
            call = method(timeout=CALL_S)
            with contextlib.suppress(Exception):  # it has failed already; what follows says how
                await call.done_writing()
        if self.kind.endswith("_unary"):
            return bytes(await call)
        answer = await call.read()
        call.cancel()
        return b"" if answer is grpc.aio.EOF else bytes(answer)


def _certificate(context: Any) -> bytes:
    found: bytes = context.auth_context()["x509_pem_cert"][0]
    return found


async def _none() -> AsyncIterator[bytes]:
    for nothing in ():
        yield nothing


def rpcs_of(file: Any) -> list[Rpc]:
    """Those of a file's descriptor, but the public ones."""
    return [
        Rpc(
            f"/{service.full_name}/{method.name}",
            f"{'stream' if method.client_streaming else 'unary'}_"
            f"{'stream' if method.server_streaming else 'unary'}",
        )
        for service in file.services_by_name.values()
        if service.full_name != PUBLIC
        for method in service.methods
    ]


def mesh_rpcs() -> list[Rpc]:
    """Every RPC between services."""
    names = [m.name for m in pkgutil.iter_modules(infermesh.v1.__path__) if m.name[-4:] == "_pb2"]
    files = [importlib.import_module(f"infermesh.v1.{name}").DESCRIPTOR for name in names]
    return [one for file in files for one in rpcs_of(file)]


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc is untyped
    def __init__(self) -> None:
        self._by_path = {one.path: one.handler() for one in mesh_rpcs()}

    def service(self, details: Any) -> Any:
        return self._by_path.get(details.method)


@asynccontextmanager
async def guarded_server(folder: Path) -> AsyncIterator[str]:
    """Its address on loopback TCP."""
    server = rpc.create_server(guarded=True)
    server.add_generic_rpc_handlers((_Handlers(),))
    health = rpc.add_standard_services(server, [])
    address = rpc.bind(server, "127.0.0.1:0", certificates.of(folder, SERVER))
    await server.start()
    await health.set_serving(True)
    try:
        yield address
    finally:
        await server.stop(0)


def showing(address: str, folder: Path) -> grpc.aio.Channel:
    """A channel that shows whatever certificate is in a folder."""
    credentials = channel_credentials(certificates.material(folder))
    return grpc.aio.secure_channel(address, credentials, options=rpc.as_server(SERVER))
