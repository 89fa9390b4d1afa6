"""`infermesh restart`: every process of this machine's mesh gives way to a new one, under load."""

import os
import signal
import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from infermesh.errors import Internal, ReplicaUnavailable
from infermesh.mesh.state import StateFolder

_POLL_S = 0.1


def restart(
    timeout: Annotated[float, typer.Option(help="Seconds to wait for its end.", min=1)] = 600.0,
) -> None:
    """Restart the mesh of this machine process by process; no request fails where each model has
    two replicas or more.
    """
    state = StateFolder.of_user()
    meshes = state.running()
    if not meshes:
        raise ReplicaUnavailable("no mesh runs on this machine; start one with `infermesh up`")
    pid: int = meshes[-1]["pid"]
    before = _rolls(meshes[-1])
    os.kill(pid, signal.SIGUSR1)
    console, began = Console(), time.monotonic()
    with console.status("restarting"):
        after = before
        while after == before:
            if time.monotonic() - began > timeout:
                raise Internal(f"the restart did not end within {timeout:g} s; it goes on")
            time.sleep(_POLL_S)
            facts = next((mesh for mesh in state.running() if mesh["pid"] == pid), None)
            if facts is None:
                raise ReplicaUnavailable("the mesh ended meanwhile")
            after = _rolls(facts)
    if after["error"]:
        raise Internal(after["error"])
    console.print(f"restarted all processes in {time.monotonic() - began:.1f} s", highlight=False)


def _rolls(facts: Mapping[str, Any]) -> dict[str, Any]:
    rolls: dict[str, Any] = facts["rolling_restarts"]
    return rolls
