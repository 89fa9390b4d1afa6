"""Auth instances by name: those that DNS adds are asked, those that it drops are not."""

import asyncio
from collections.abc import Sequence

import pytest

from gateway.auth.instances import AuthInstances
from infermesh.config import ConfigError


class Names:
    """A name server with one name."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.asked = asyncio.Event()

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.asked.set()
        return [f"{address}:{port}" for address in self.addresses]


async def looked(names: Names) -> None:
    """Until it was asked again, and what it said was taken in."""
    for _ in range(2):
        names.asked.clear()
        async with asyncio.timeout(10):
            await names.asked.wait()


async def test_addresses_of_a_name_are_followed() -> None:
    names = Names("127.0.0.1", "127.0.0.2")
    instances = AuthInstances(("dns:auth:8030",), 0.01, None, resolve=names.resolve)
    picker = instances.picker()
    before = picker.stub
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(instances.run())
        await looked(names)
        first = picker.stub
        assert first is not before
        picker.failed(first)
        second = picker.stub
        assert second is not first
        names.addresses = ("127.0.0.2",)
        await looked(names)
        left = picker.stub
        assert left in (first, second)
        picker.failed(left)
        assert picker.stub is left, "there is no other"
        running.cancel()
    await instances.close()


@pytest.mark.parametrize("entry", ["auth", "dns:auth", "host:port"])
async def test_entry_that_is_no_address_is_refused_by_its_setting(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.auth: .*neither"):
        AuthInstances((entry,), 1.0, None)
