"""A rolling restart: every process of a mesh gives way to a new one, and no request fails.

Auth and cache first, which the gateway does without for a moment; then replica by replica, whose
streams move to another; the gateway last: its successor serves before it drains.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from infermesh.errors import Internal
from infermesh.mesh.process import ManagedProcess
from infermesh.mesh.readiness import wait_replica, wait_routable
from infermesh.security.certificates import Certificates

# What was done so far, for a person.
Report = Callable[[str], None]
# For a process to come back, and a replica to load its model: then the restart ends there.
PATIENCE_S = 300.0


async def roll(
    processes: Mapping[str, ManagedProcess],
    replicas: Sequence[str],
    admin_url: str,
    grace_s: float,
    report: Report,
    certificates: Certificates | None = None,
) -> None:
    """Replaces all processes but the gateway.

    Args:
        processes: by name.
        replicas: the schedulers' addresses, in the order of their numbers.
        grace_s: for each process to drain.

    Raises:
        Internal: a process does not come back; those after it are left as they are.
    """
    for name in ("auth", "cache"):
        if name in processes:
            await processes[name].end(grace_s)
            await _renewed(processes[name])
            report(name)
    for number, address in enumerate(replicas):
        scheduler, shard = processes[f"scheduler-{number}"], processes[f"shard-{number}"]
        # the shard only once nothing runs on it any more
        for process in (scheduler, shard):
            await process.end(grace_s)
        for process in (shard, scheduler):
            await _renewed(process)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await wait_replica(address, lambda *_: None, certificates)
                await wait_routable(admin_url, address)
        except TimeoutError:
            raise Internal(f"replica {number} does not serve again: {shard.last_words()}") from None
        report(f"replica {number}")


async def _renewed(process: ManagedProcess) -> None:
    try:
        async with asyncio.timeout(PATIENCE_S):
            await process.renewed()
    except TimeoutError:
        raise Internal(process.last_words()) from None
