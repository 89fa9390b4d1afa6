"""A program: a shard over TLS from start to end, asked once; prints what of gRPC is left then.

Arguments: a folder, with the certificates in its `tls`. Run by test_ended.
"""

import asyncio
import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

import grpc

from infermesh import lifecycle, rpc
from infermesh.config import SecurityConfig, ShardConfig, TelemetryConfig
from infermesh.security.identities import Identity
from infermesh.security.posture import Security
from services.shard.service import ShardService
from tests import certificates
from tests.contract.security.harness import Rpc

HEALTH = Rpc("/grpc.health.v1.Health/Check", "unary_unary")


class Asked(ShardService):
    """Asks itself whether it is well, and stops."""

    folder: Path

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        await super().start(tasks)
        own = certificates.of(self.folder / "tls", Identity.OPERATOR)
        async with rpc.channel(self.address, Identity.SHARD, own) as channel:
            sys.stdout.write(f"{await HEALTH.call(channel)!r}\n")
        os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path) -> None:
    """Runs it, then looks."""
    Asked.folder = folder
    config = ShardConfig(address=f"unix:{folder}/shard.sock", engine="simulated")
    security = SecurityConfig(tls_folder=str(folder / "tls"))
    status = lifecycle.run(
        lambda: Asked(config, Security.of(security, Identity.SHARD)), TelemetryConfig(), 1.0
    )
    kinds: tuple[Any, ...] = (grpc.aio.Server, grpc.aio.Channel)
    left = [type(one).__name__ for one in gc.get_objects() if isinstance(one, kinds)]
    sys.stdout.write(f"status {status}, left: {left}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
