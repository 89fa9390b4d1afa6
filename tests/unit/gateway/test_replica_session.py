"""What a session makes of a scheduler's messages."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.replica.session import Session
from infermesh.errors import ProtocolViolation
from infermesh.v1 import scheduler_service_pb2 as pb


class Call:
    """A stream that says one thing and ends."""

    def __init__(self, message: pb.SessionResponse) -> None:
        self._message = message

    async def __aiter__(self) -> AsyncIterator[pb.SessionResponse]:
        yield self._message

    def cancel(self) -> None: ...


async def test_session_ends_when_packed_tokens_are_not_one_in_each_list() -> None:
    tokens = pb.PackedTokens(stream_ids=[1], choices=[0], starts=[0], token_ids=[5, 6])

    def open_stream(requests: Any) -> Any:
        return Call(pb.SessionResponse(tokens=tokens))

    with pytest.raises(ProtocolViolation):
        await Session(open_stream).run(lambda: None)
