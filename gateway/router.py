"""Chooses among replica clients by the configured policy, and counts what came of it.

Gathers what `routing` decides on; the decision itself is there.
"""

import asyncio
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from gateway import metrics
from gateway.prompt_blocks import PromptBlocks
from gateway.prompt_tree import PromptTree
from gateway.replica.client import ReplicaClient
from gateway.routing import Candidate, Policy, choose, choose_by_prefix, choose_in_turn

# About 0.7 ms of hashing.
_LONG_PROMPT = 8192


class Router:
    """One policy, for all of the gateway's requests."""

    def __init__(self, policy: Policy, threads: ThreadPoolExecutor) -> None:
        self._policy = policy
        self._threads = threads
        self._tree = PromptTree()
        self._turn = 0

    async def prepare(self, able: Sequence[ReplicaClient], prompt: PromptBlocks) -> None:
        """Hashes a long prompt in a thread, if `choose` will need it: the loop has better to do."""
        if prompt.num_tokens < _LONG_PROMPT or not self._heeds_prefixes(able):
            return
        loop = asyncio.get_running_loop()
        for block_size in {client.prefixes.block_size for client in able}:
            await loop.run_in_executor(self._threads, prompt.of, block_size)

    def choose(
        self, able: Sequence[ReplicaClient], prompt: PromptBlocks | None
    ) -> ReplicaClient | None:
        """The one of these that a request is to be sent to; None where there is none.

        Args:
            prompt: the request's; None: without regard to who holds what.
        """
        heeded = prompt if self._heeds_prefixes(able) else None
        candidates = self._candidates(able, heeded)
        chosen = self._decide(candidates, heeded is not None)
        if chosen is None:
            return None
        # by identity: nothing keeps two schedulers from reporting the same id
        client = next(c for c, one in zip(able, candidates, strict=True) if one is chosen)
        if prompt is not None:
            client.note_tokens(prompt.num_tokens - chosen.num_tokens_matched)
        if heeded is not None:
            blocks = heeded.of(client.prefixes.block_size)
            client.prefixes.expect(blocks)
            self._tree.add(blocks)
            metrics.PREFIX_ROUTED.labels("hit" if chosen.num_tokens_matched else "miss").inc()
            metrics.PREFIX_MATCHED_TOKENS.inc(chosen.num_tokens_matched)
        return client

    def _candidates(
        self, able: Sequence[ReplicaClient], prompt: PromptBlocks | None
    ) -> list[Candidate]:
        if prompt is None:
            return [client.candidate() for client in able]
        costs = {
            size: self._tree.costs(prompt.of(size), size, prompt.num_tokens, len(able))
            for size in {client.prefixes.block_size for client in able}
        }
        return [
            client.candidate(prompt.of(size), costs[size])
            for client in able
            for size in (client.prefixes.block_size,)
        ]

    def _heeds_prefixes(self, able: Sequence[ReplicaClient]) -> bool:
        return self._policy is Policy.PREFIX and len(able) > 1

    def _decide(self, candidates: Sequence[Candidate], by_prefix: bool) -> Candidate | None:
        if by_prefix:
            return choose_by_prefix(candidates, random.randrange)
        if self._policy is Policy.ROUND_ROBIN:
            self._turn += 1
            return choose_in_turn(candidates, self._turn)
        return choose(candidates, random.randrange)
