"""Which peers there are: as the settings list them, as DNS names them, as a file has them.

    gateway.replicas       host:port, unix:/path     always
                           dns:host:port             each address of the name, asked again and again
    gateway.replicas_file  one of these per line     read again and again; '#' begins a comment

Tells the whole set whenever it has changed. A look that fails, or finds none, changes nothing: a
name server's or a mount's bad minute must not take replicas away that serve.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from gateway import metrics
from infermesh import sockets
from infermesh.config import ConfigError
from infermesh.telemetry import logs

_log = logs.get(__name__)
DNS = "dns:"
# (host, port) -> addresses
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
Look = Callable[[], Awaitable[Sequence[str]]]


class Discovery:
    """Follows every source.

    Args:
        entries: as in `gateway.replicas`.
        file: as in `gateway.replicas_file`; empty: none.
        interval_s: between two looks.
        on_change: takes all addresses; called at once with those that need no look.
        refuse: raises ConfigError where one of these addresses is not to be connected to.
        setting: whose entries they are.

    Raises:
        ConfigError: an entry can't be read.
    """

    def __init__(
        self,
        entries: Sequence[str],
        file: str,
        interval_s: float,
        on_change: Callable[[Sequence[str]], None],
        resolve: Resolve | None = None,
        refuse: Callable[[Sequence[str]], None] = lambda addresses: None,
        setting: str = "gateway.replicas",
    ) -> None:
        self._refuse = refuse
        self._setting = setting
        self._interval_s = interval_s
        self._on_change = on_change
        self._resolve = resolve or resolve_name
        self._known: tuple[str, ...] = ()
        try:
            names = [split(entry) for entry in entries if entry.startswith(DNS)]
            self._static = [check(entry) for entry in entries if not entry.startswith(DNS)]
        except ValueError as exc:
            raise ConfigError(f"{setting}: {exc}") from None
        refuse(self._static)
        self._looks: list[tuple[str, str, Look]] = [
            ("dns", f"{DNS}{host}:{port}", lambda h=host, p=port: self._resolve(h, p))  # type: ignore[misc]  # mypy has no type for a lambda's defaults
            for host, port in names
        ]
        if file:
            self._looks.append(("file", file, lambda: self._read(Path(file))))
        # Of each look, what it found last.
        self._found: dict[str, Sequence[str]] = {}
        self._tell()

    async def run(self) -> None:
        """Looks until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for kind, name, look in self._looks:
                tasks.create_task(self._follow(kind, name, look))

    async def _follow(self, kind: str, name: str, look: Look) -> None:
        fails = False
        while True:
            try:
                found = await look()
                if not found:
                    raise ValueError("it has no address")
                self._refuse(found)
            except (OSError, ValueError, ConfigError) as exc:
                metrics.DISCOVERY_FAILURES.labels(kind).inc()
                if not fails:
                    facts = {"setting": self._setting, "source": name, "why": str(exc)}
                    _log.warning("no addresses found", extra=facts)
                fails = True
            else:
                fails = False
                self._found[name] = found
                self._tell()
            await asyncio.sleep(self._interval_s)

    async def _read(self, path: Path) -> list[str]:
        """Raises OSError or ValueError where the file can't be used as it stands."""
        text = await asyncio.to_thread(path.read_text)
        lines = [line.partition("#")[0].strip() for line in text.splitlines()]
        found: list[str] = []
        for line in filter(None, lines):
            if line.startswith(DNS):
                found += await self._resolve(*split(line))
            else:
                found.append(check(line))
        return found

    def _tell(self) -> None:
        everything = [*self._static, *(one for found in self._found.values() for one in found)]
        known = tuple(dict.fromkeys(everything))
        if set(known) != set(self._known):
            self._known = known
            self._on_change(known)


def check(address: str) -> str:
    """The address, if it is one. Raises ValueError."""
    if address.removeprefix("unix:") and address.startswith("unix:"):
        return address
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"{address!r} is neither host:port nor unix:/path")
    return address


def split(entry: str) -> tuple[str, int]:
    """Host and port of dns:host:port. Raises ValueError."""
    host, _, port = check(entry.removeprefix(DNS)).rpartition(":")
    return host, int(port)


async def resolve_name(host: str, port: int) -> list[str]:
    """The IPv4 addresses of a name; of one that has none, the IPv6 ones.

    Raises:
        OSError: there is no such name, or no name server answers.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    by_family = {
        family: sorted({str(a[0]) for f, *_, a in found if f == family})
        for family in (socket.AF_INET, socket.AF_INET6)
    }
    return [
        sockets.join(ip, port) for ip in by_family[socket.AF_INET] or by_family[socket.AF_INET6]
    ]
