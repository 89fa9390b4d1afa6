"""One call to the auth service over which leases are reported. Decides nothing."""

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

from gateway.auth.account import Grant, State
from gateway.auth.translate import grant_from_pb, state_to_pb
from infermesh.errors import AuthUnavailable, MeshError, ProtocolViolation
from infermesh.v1 import auth_service_pb2 as pb

if TYPE_CHECKING:  # the type of the asyncio stub exists in the stubs alone
    from infermesh.v1.auth_service_pb2_grpc import AuthServiceAsyncStub

ANSWER_S = 3.0
# the last: a call that has ended by itself can't be written
BROKEN = (grpc.aio.AioRpcError, MeshError, TimeoutError, asyncio.InvalidStateError)


class LeaseStream:
    """Begins with a hello; whoever opens it cancels it."""

    def __init__(self, stub: "AuthServiceAsyncStub", hello: pb.LeaseHello) -> None:
        self._call: Any = stub.Lease()
        self._hello = hello

    async def open(self) -> None:
        """Says who reports; returns when that was taken in. Raises one of BROKEN."""
        async with asyncio.timeout(ANSWER_S):
            await self._call.write(pb.LeaseRequest(hello=self._hello))
        await self.exchange([])

    async def exchange(self, states: list[State]) -> list[Grant]:
        """The answer to each state. Raises one of BROKEN."""
        message = pb.LeaseRequest(report=pb.LeaseReport(leases=map(state_to_pb, states)))
        async with asyncio.timeout(ANSWER_S):
            await self._call.write(message)
            answer = await self._call.read()
        if not isinstance(answer, pb.LeaseResponse):
            # the stream ended: the call's status says why
            raise AuthUnavailable((await self._call.details()) or "the lease stream ended")
        if len(answer.grants) != len(states):
            raise ProtocolViolation("a lease report was not answered in full")
        return [grant_from_pb(message) for message in answer.grants]

    def cancel(self) -> None:
        """No lease ends with it."""
        self._call.cancel()
