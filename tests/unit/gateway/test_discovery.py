"""Which replicas are told of when names and files change, fail and come back."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.discovery import Discovery, check, resolve_name
from infermesh.config import ConfigError
from infermesh.telemetry import metrics

INTERVAL_S = 0.001


class Told:
    """What discovery said, and an event for each time."""

    def __init__(self) -> None:
        self.addresses: list[Sequence[str]] = []
        self._more = asyncio.Event()

    def __call__(self, addresses: Sequence[str]) -> None:
        self.addresses.append(addresses)
        self._more.set()

    async def until(self, *wanted: str) -> None:
        async with asyncio.timeout(10):
            while not self.addresses or sorted(self.addresses[-1]) != sorted(wanted):
                self._more.clear()
                await self._more.wait()


class Names:
    """A name server of one name."""

    def __init__(self, *found: str) -> None:
        self.found: Sequence[str] | OSError = found
        self.num_asked = 0
        self._asked = asyncio.Condition()

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        async with self._asked:
            self.num_asked += 1
            self._asked.notify_all()
        if isinstance(self.found, OSError):
            raise self.found
        return [f"{ip}:{port}" for ip in self.found]

    async def asked_again(self) -> None:
        """A look that began after this call is over."""
        async with asyncio.timeout(10), self._asked:
            enough = self.num_asked + 2
            await self._asked.wait_for(lambda: self.num_asked >= enough)


@asynccontextmanager
async def following(
    told: Told, entries: Sequence[str] = (), file: str = "", names: Names | None = None
) -> AsyncIterator[None]:
    discovery = Discovery(entries, file, INTERVAL_S, told, names)
    task = asyncio.ensure_future(discovery.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


def failures(source: str) -> float:
    for line in metrics.exposition()[0].decode().splitlines():
        if line.startswith(f'infermesh_discovery_failures_total{{source="{source}"}}'):
            return float(line.split()[-1])
    return 0.0


async def test_listed_replicas_are_told_of_at_once() -> None:
    told = Told()
    Discovery(("a:1", "unix:/b"), "", 1.0, told)
    assert told.addresses == [("a:1", "unix:/b")]


async def test_every_address_of_a_name_is_a_replica_and_changes_are_followed() -> None:
    told, names = Told(), Names("10.0.0.1", "10.0.0.2")
    async with following(told, ("a:1", "dns:replicas.svc:8010"), names=names):
        await told.until("a:1", "10.0.0.1:8010", "10.0.0.2:8010")
        names.found = ("10.0.0.2", "10.0.0.3")
        await told.until("a:1", "10.0.0.2:8010", "10.0.0.3:8010")


async def test_addresses_that_are_not_to_be_connected_to_are_not_told_of() -> None:
    told, names = Told(), Names("10.0.0.1")

    def refuse(addresses: Sequence[str]) -> None:
        if any(not address.startswith("127.") for address in addresses):
            raise ConfigError("in the clear")

    entries = ("127.0.0.1:1", "dns:replicas.svc:8010")
    discovery = Discovery(entries, "", INTERVAL_S, told, names, refuse)
    task = asyncio.ensure_future(discovery.run())
    await names.asked_again()
    assert told.addresses == [("127.0.0.1:1",)]
    names.found = ("127.0.0.2",)
    await told.until("127.0.0.1:1", "127.0.0.2:8010")
    task.cancel()
    await asyncio.wait([task])
    with pytest.raises(ConfigError, match="in the clear"):
        Discovery(("10.0.0.1:1",), "", INTERVAL_S, told, names, refuse)


@pytest.mark.parametrize("answer", [OSError("no name server"), ()], ids=["fails", "is empty"])
async def test_last_known_replicas_stay_when_the_answer(answer: OSError | tuple[()]) -> None:
    told, names = Told(), Names("10.0.0.1")
    async with following(told, ("dns:replicas.svc:8010",), names=names):
        await told.until("10.0.0.1:8010")
        before, count = failures("dns"), len(told.addresses)
        names.found = answer
        await names.asked_again()
        assert len(told.addresses) == count
        assert failures("dns") > before
        names.found = ("10.0.0.9",)
        await told.until("10.0.0.9:8010")


async def test_file_is_followed_and_may_be_bad_for_a_while(tmp_path: Path) -> None:
    told, file = Told(), tmp_path / "replicas"
    async with following(told, file=str(file)):
        file.write_text("a:1  # the first\n\nunix:/b\n")
        await told.until("a:1", "unix:/b")
        count = len(told.addresses)
        for bad in ("", "nonsense\n", None):
            before = failures("file")
            if bad is None:
                file.unlink()
            else:
                file.write_text(bad)
            async with asyncio.timeout(10):
                while failures("file") < before + 2:  # noqa: ASYNC110  # a count has no event
                    await asyncio.sleep(0)
        assert len(told.addresses) == count
        draft = tmp_path / "draft"  # as a ConfigMap is replaced
        draft.write_text("c:3\n")
        draft.replace(file)
        await told.until("c:3")


async def test_names_may_stand_in_the_file(tmp_path: Path) -> None:
    told, file = Told(), tmp_path / "replicas"
    file.write_text("dns:replicas.svc:7\na:1\n")
    async with following(told, file=str(file), names=Names("10.0.0.1")):
        await told.until("10.0.0.1:7", "a:1")


@pytest.mark.parametrize("entry", ["a", "a:", ":1", "a:x", "a:70000", "unix:", "dns:a", "dns::1"])
async def test_entry_that_is_no_address_is_refused_by_name(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.replicas: "):
        Discovery((entry,), "", 1.0, Told())


@given(
    st.from_regex(r"[a-z0-9.-]{1,20}|\[[0-9a-f:]{2,20}\]", fullmatch=True), st.integers(1, 65535)
)
def test_every_host_and_port_is_an_address(host: str, port: int) -> None:
    assert check(f"{host}:{port}") == f"{host}:{port}"


async def test_name_of_this_machine_is_resolved() -> None:
    assert await resolve_name("localhost", 80) in (["127.0.0.1:80"], ["[::1]:80"])
