"""What the watchdog takes for silence where the mesh speaks TLS."""

import asyncio
import shutil
import socket
from pathlib import Path
from typing import Any

import grpc
import pytest

from infermesh import rpc
from infermesh.mesh import watchdog
from infermesh.security.identities import Identity
from tests import certificates
from tests.contract.security.harness import SERVER, guarded_server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return certificates.make(tmp_path / "tls")


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PROBE_TIMEOUT_S", 0.5)


async def answers(address: str, folder: Path) -> bool:
    own = certificates.of(folder, Identity.OPERATOR)
    return await watchdog.answers(address, SERVER, own)


async def test_process_that_is_well_answers(folder: Path) -> None:
    async with guarded_server(folder) as address:
        assert await answers(address, folder)


async def test_refused_certificate_is_an_answer(folder: Path, tmp_path: Path) -> None:
    other = certificates.make(tmp_path / "other")
    shutil.copy(folder / "operator" / "ca.crt", other / "operator" / "ca.crt")
    async with guarded_server(folder) as address:
        assert await answers(address, other)
        assert await answers(address, certificates.make(tmp_path / "stranger"))


async def test_process_that_takes_connections_and_says_nothing_is_silent(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stopped:
        assert not await answers(f"127.0.0.1:{stopped.getsockname()[1]}", folder)


async def test_process_that_is_connected_and_does_not_answer_is_silent(folder: Path) -> None:
    class Hung(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc is untyped
        def service(self, details: Any) -> Any:
            async def never(request: Any, context: Any) -> bytes:
                await asyncio.Event().wait()
                return b""

            return grpc.unary_unary_rpc_method_handler(never)

    server = rpc.create_server(guarded=True)
    server.add_generic_rpc_handlers((Hung(),))
    address = rpc.bind(server, "127.0.0.1:0", certificates.of(folder, SERVER))
    await server.start()
    try:
        assert not await answers(address, folder)
    finally:
        await server.stop(0)
