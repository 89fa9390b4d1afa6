"""What may befall a process of a mesh, done to it from outside: killed, stopped, cut off."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.e2e.mesh_process import Mesh, wait_until

_PIDFD_GETFD = 438
_CONNECTED = "03"


def kill(mesh: Mesh, name: str) -> None:
    """SIGKILL; the supervisor starts another."""
    old_pid = mesh.kill(name)
    mesh.wait_restarted(name, old_pid)


def stop(mesh: Mesh, name: str) -> None:
    """SIGSTOP, silence without an end, until its replica is known to be lost; then it goes on."""
    pid = mesh.kill(name, signal.SIGSTOP)
    number = int(name.rpartition("-")[2])
    try:
        wait_until(lambda: not usable(mesh, number), 60.0, f"{name} is silent, and nobody noticed")
    finally:
        with contextlib.suppress(ProcessLookupError):  # the supervisor was quicker
            os.kill(pid, signal.SIGCONT)


def usable(mesh: Mesh, number: int) -> bool:
    """The gateway sends requests to this replica, which has its shard."""
    replicas = httpx.get(f"{mesh.facts['admin_url']}/debug/replicas", timeout=10.0).json()
    found = next(one for one in replicas if one["address"].endswith(f"scheduler-{number}.sock"))
    return bool(found["routable"]) and found["state"] == "serving"


def cut(mesh: Mesh, name: str) -> int:
    """Ends every connection that peers have to a process; how many there were."""
    pid: int = mesh.service(name)["pid"]
    count = 0
    for connection in _connections(pid):
        with connection, contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
            count += 1
    return count


def _connections(pid: int) -> Iterator[socket.socket]:
    """Duplicates of the sockets that the process has accepted on a unix socket."""
    accepted = _accepted_inodes()
    pidfd = os.pidfd_open(pid)
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(entry) in accepted:
                    yield socket.socket(fileno=_duplicate(pidfd, int(entry.name)))
    finally:
        os.close(pidfd)


def _accepted_inodes() -> set[str]:
    found = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) == 8 and fields[5] == _CONNECTED:
            found.add(f"socket:[{fields[6]}]")
    return found


def _duplicate(pidfd: int, number: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    duplicate: int = libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
    if duplicate < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return duplicate
