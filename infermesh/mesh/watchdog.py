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
from infermesh.stall import Silence
from infermesh.telemetry import logs

PROBE_EVERY_S = 1.0
PROBE_TIMEOUT_S = 2.0
WEDGED_AFTER_S = 15.0
# An empty message is the question for the server as a whole; the answer need not be read. So the
# command line does without the package of the health service.
_CHECK = "/grpc.health.v1.Health/Check"
_log = logs.get(__name__)


async def watch(process: ManagedProcess, certificates: Certificates | None = None) -> None:
    """Probes one process until cancelled."""
    silence = Silence(time.monotonic, 2 * (PROBE_EVERY_S + PROBE_TIMEOUT_S))
    while True:
        await asyncio.sleep(PROBE_EVERY_S)
        pid = process.serving_pid
        if pid is None:
            silence.heard()
            continue
        address, identity = process.facts["address"], process.spec.identity
        if await _answers(rpc.channel(address, identity, certificates)):
            silence.heard()
        elif silence.look() > WEDGED_AFTER_S and process.serving_pid == pid:
            _log.error("a process is wedged", extra={"wedged": process.spec.name, "pid": pid})
            process.crash()
            silence.heard()


async def _answers(connection: grpc.aio.Channel) -> bool:
    """Anything but silence is an answer."""
    async with connection as channel:
        try:
            # a stopped process takes connections, and never greets: that is silence, too
            await channel.unary_unary(_CHECK)(b"", timeout=PROBE_TIMEOUT_S, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            return error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
    return True
