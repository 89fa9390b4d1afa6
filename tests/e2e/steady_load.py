"""Clients that never stop asking, to see what a mesh that changes does to them."""

import asyncio
from collections import Counter

import httpx
import openai

from tests.e2e.mesh_process import Mesh

CLIENTS = 8
TOKENS = 40
SEEDS = 5


class Load:
    """Clients that ask again and again, over connections that they keep, and never retry."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.began = asyncio.Event()
        self.stopping = asyncio.Event()
        self.texts: dict[int, set[str]] = {seed: set() for seed in range(SEEDS)}
        self.outcomes: Counter[str] = Counter()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                tasks.create_task(self._ask_on(number))

    async def _ask_on(self, number: int) -> None:
        async with self._mesh.async_openai(max_retries=0) as client:
            while not self.stopping.is_set():
                number += 1
                try:
                    text = await self._ask(client, number % SEEDS)
                except (openai.APIError, httpx.HTTPError) as error:
                    self.outcomes[f"{type(error).__name__}: {error}"] += 1
                else:
                    self.outcomes["ok"] += 1
                    self.began.set()
                    self.texts[number % SEEDS].add(text)

    async def _ask(self, client: openai.AsyncOpenAI, seed: int) -> str:
        text = ""
        async for chunk in await client.completions.create(
            model=self._mesh.model,
            prompt="Anything",
            temperature=1,
            seed=seed,
            max_tokens=TOKENS,
            stream=True,
        ):
            text += chunk.choices[0].text if chunk.choices else ""
        return text
