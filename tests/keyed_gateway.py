"""A gateway that asks a real auth service, and what tests ask of both."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai

from tests.auth_process import Auth
from tests.gateway_process import Edge, make_replicas, running_gateway

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


@asynccontextmanager
async def keyed_gateway(
    folder: Path, auth: Auth, *others: Auth, **settings: Any
) -> AsyncIterator[Edge]:
    """A gateway in front of one fake replica that asks `auth`, or one of the others."""
    await asyncio.to_thread(folder.mkdir, exist_ok=True)
    settings.setdefault("usage_dir", str(folder / "usage"))
    addresses = (auth.config.address, *(other.config.address for other in others))
    async with running_gateway(folder, make_replicas(folder), auth=addresses, **settings) as edge:
        yield edge


def client(edge: Edge, api_key: str) -> openai.AsyncOpenAI:
    return edge.openai.with_options(api_key=api_key)


async def ask(edge: Edge, api_key: str, **options: Any) -> Any:
    """One whole answer; 4 tokens of output unless told otherwise."""
    return await client(edge, api_key).chat.completions.create(
        **{**CHAT, "max_tokens": 4, "temperature": 1.0, **options}
    )


async def refused(edge: Edge, api_key: str, within_s: float) -> openai.APIStatusError:
    """Asks until that is refused."""
    async with asyncio.timeout(within_s):
        while True:
            try:
                await ask(edge, api_key)
            except openai.APIStatusError as error:
                return error


async def settled(auth: Auth, num_requests: int, tenant: str = "") -> list[Any]:
    """The ledger, once it has so many rows."""
    async with asyncio.timeout(20):
        while True:
            totals = await auth.usage(tenant)
            if sum(total.num_requests for total in totals) >= num_requests:
                return totals
            await asyncio.sleep(0.05)  # a poll: usage is sent in the background
