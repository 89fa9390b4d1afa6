"""Ends a process of the mesh that does not answer any more, so that its keeper starts another.

A process that is only busy answers: its event loop runs beside whatever it computes. One that has
not announced itself yet is still starting.
"""

import asyncio
import time

import grpc

from infermesh import rpc
from infermesh.mesh.process import ManagedProcess
from infermesh.security.certificates import Certificates
from infermesh.security.identities import Identity
from infermesh.stall import Silence
from infermesh.telemetry import logs

PROBE_EVERY_S = 1.0
PROBE_TIMEOUT_S = 2.0
WEDGED_AFTER_S = 15.0
# An empty message is the question for the server as a whole; the answer need not be read. So the
# command line does without the package of the health service.
_CHECK = "/grpc.health.v1.Health/Check"
_NO_TLS = b"\n" * 16
_log = logs.get(__name__)


async def watch(process: ManagedProcess, certificates: Certificates | None = None) -> None:
    """Probes one process until cancelled."""
    silence = Silence(time.monotonic, 2 * (PROBE_EVERY_S + PROBE_TIMEOUT_S))
    while True:
        await asyncio.sleep(PROBE_EVERY_S)
        pid = process.serving_pid
        if pid is None or await answers(
            process.facts["address"], process.spec.identity, certificates
        ):
            silence.heard()
        elif silence.look() > WEDGED_AFTER_S and process.serving_pid == pid:
            _log.error("a process is wedged", extra={"wedged": process.spec.name, "pid": pid})
            process.crash()
            silence.heard()


async def answers(
    address: str, identity: Identity, certificates: Certificates | None = None
) -> bool:
    """Anything but silence is an answer, a refusal of our certificate as well."""
    async with rpc.channel(address, identity, certificates) as channel:
        try:
            # a stopped process takes connections, and never greets: that is silence, too
            await channel.unary_unary(_CHECK)(b"", timeout=PROBE_TIMEOUT_S, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                return True
            is_connected = channel.get_state() is grpc.ChannelConnectivity.READY
            return certificates is not None and not is_connected and await _hangs_up(address)
    return True


async def _hangs_up(address: str) -> bool:
    """Whether it ends a connection that does not begin as TLS does, which takes a live process."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            if address.startswith("unix:"):
                path = address.removeprefix("unix:")
                reader, writer = await asyncio.open_unix_connection(path)
            else:
                host, _, port = address.rpartition(":")
                reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            try:
                writer.write(_NO_TLS)
                await reader.read()
            finally:
                writer.close()
    except TimeoutError:
        return False
    except OSError:  # reset, or nobody listens: it is not silent
        return True
    return True
