"""Nobody has the last of an answer before it was accounted for."""

import asyncio
from types import SimpleNamespace
from typing import Any

from gateway.records import RequestRecord
from gateway.reply import Reply
from gateway.request import RequestId
from gateway.tokens import Usage


class Prompt:
    """Hands out one piece after the other."""

    texts = ()

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces
        self._taken = 0
        self.reader = SimpleNamespace(
            close=lambda: None, generation=SimpleNamespace(replica_ids=[])
        )

    @property
    def done(self) -> bool:
        return self._taken == len(self._pieces)

    def take(self) -> list[Any]:
        self._taken += 1
        return [self._pieces[self._taken - 1]]

    def usage(self) -> Usage:
        return Usage(prompt_tokens=3, completion_tokens=self._taken, cached_prompt_tokens=0)

    def timings(self) -> None:
        return None


class Ticket:
    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.settled: list[Usage] = []

    def settle(self, record: RequestRecord) -> None:
        self.settled.append(record.usage)

    def cancel(self) -> None:
        raise AssertionError


async def test_reply_is_settled_before_its_last_batch_is_handed_out() -> None:
    ticket = Ticket()
    prompts: Any = [Prompt(["a", "b", "c"])]
    reply = Reply(
        model=SimpleNamespace(),  # type: ignore[arg-type]  # not asked for anything
        prompts=prompts,
        wake=asyncio.Event(),
        record=RequestRecord(RequestId("r"), "chat", 0.0),
        deadline=1e9,
        clock=lambda: 0.0,
        ticket=ticket,
        on_close=lambda: None,
    )
    settled_at = [(batch, list(ticket.settled)) async for batch in reply.batches()]
    assert settled_at == [
        (["a"], []),
        (["b"], []),
        (["c"], [Usage(prompt_tokens=3, completion_tokens=3, cached_prompt_tokens=0)]),
    ]
