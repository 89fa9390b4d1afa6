"""The auth instances there are, and which of them is asked: any, until it fails, then the next.

    gateway.auth   host:port, unix:/path   always
                   dns:host:port           each address of the name, asked again and again

Instances share one database, and one store of leases: what one began another goes on with.
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import grpc

from gateway.discovery import DNS, Discovery, Resolve
from infermesh import rpc
from infermesh.security.certificates import Certificates
from infermesh.security.identities import Identity
from infermesh.telemetry import logs
from infermesh.v1.auth_service_pb2_grpc import AuthServiceStub

if TYPE_CHECKING:  # the type of the asyncio stub exists in the stubs alone
    from infermesh.v1.auth_service_pb2_grpc import AuthServiceAsyncStub

_log = logs.get(__name__)


class Picker:
    """Which instance one kind of question goes to; kinds fail apart: Redis may be away for one.

    Args:
        stubs: all of them, never none; their owner may change what is in it.
    """

    def __init__(self, stubs: "Sequence[AuthServiceAsyncStub]") -> None:
        self._stubs = stubs
        # gateways spread over the instances
        self._at = secrets.randbelow(len(stubs))

    @property
    def stub(self) -> "AuthServiceAsyncStub":
        """The one to ask."""
        return self._stubs[self._at % len(self._stubs)]

    def failed(self, stub: "AuthServiceAsyncStub") -> None:
        """It did not answer, or could not; once others have moved on it changes nothing."""
        if stub is self.stub:
            self._at = (self._at + 1) % len(self._stubs)


class AuthInstances:
    """A channel to each; create it inside the event loop.

    Args:
        entries: as in `gateway.auth`.
        interval_s: between two looks at names.
        refuse: raises ConfigError where one of these addresses is not to be connected to.

    Raises:
        ConfigError: an entry can't be read.
    """

    def __init__(
        self,
        entries: Sequence[str],
        interval_s: float,
        certificates: Certificates | None,
        refuse: Callable[[Sequence[str]], None] = lambda addresses: None,
        resolve: Resolve | None = None,
    ) -> None:
        self._certificates = certificates
        self._channels: dict[str, tuple[grpc.aio.Channel, AuthServiceAsyncStub]] = {}
        self._stubs: list[AuthServiceAsyncStub] = []
        self._retired: list[grpc.aio.Channel] = []
        self._has_retired = asyncio.Event()
        self._discovery = Discovery(
            entries, "", interval_s, self._update, resolve, refuse, setting="gateway.auth"
        )
        if not self._stubs:
            # names alone: gRPC's own resolver, until they have been asked for
            self._update([entry for entry in entries if entry.startswith(DNS)])

    def picker(self) -> Picker:
        """One for each kind of question."""
        return Picker(self._stubs)

    async def run(self) -> None:
        """Follows names until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._discovery.run())
            tasks.create_task(self._close_retired())

    async def close(self) -> None:
        """Ends every call."""
        for channel in (*self._retired, *(channel for channel, _ in self._channels.values())):
            await channel.close()

    def _update(self, addresses: Sequence[str]) -> None:
        for address in set(self._channels) - set(addresses):
            self._retired.append(self._channels.pop(address)[0])
            self._has_retired.set()
        for address in addresses:
            if address not in self._channels:
                channel = rpc.channel(address, Identity.AUTH, self._certificates)
                stub = cast("AuthServiceAsyncStub", AuthServiceStub(channel))
                self._channels[address] = (channel, stub)
        self._stubs[:] = [self._channels[address][1] for address in addresses]
        _log.info("auth instances", extra={"addresses": list(addresses)})

    async def _close_retired(self) -> None:
        """Calls on an instance that is gone end, and are made again elsewhere."""
        while True:
            await self._has_retired.wait()
            self._has_retired.clear()
            while self._retired:
                await self._retired[-1].close()
                self._retired.pop()
