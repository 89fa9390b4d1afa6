"""The block hashes of one prompt, as the scheduler that gets it will compute them.

Made when first asked for: with one replica nobody asks.
"""

from collections.abc import Sequence

from gateway.request import Job
from infermesh.block_hash import (
    BlockHash,
    ShortHash,
    extend_hashes,
    long_scope,
    scope_hash,
    shorten,
)


class PromptBlocks:
    """One prompt, for the length of its request.

    Of a resumed request only the prompt counts: what it has generated is hardly held elsewhere.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._by_size: dict[int, Sequence[ShortHash]] = {}

    @property
    def num_tokens(self) -> int:
        return len(self._job.prompt_token_ids)

    def of(self, block_size: int) -> Sequence[ShortHash]:
        """The hashes of its full blocks; 0.35 ms for 4,096 tokens, the first time."""
        if not block_size:
            return ()
        if block_size not in self._by_size:
            token_ids = self._job.prompt_token_ids
            scope = scope_hash(self._job.sharing_domain)
            if 0 < self._job.rope_switch_len < len(token_ids):
                scope = long_scope(scope)
            hashes: list[BlockHash] = []
            extend_hashes(hashes, scope, token_ids, block_size)
            self._by_size[block_size] = shorten(hashes)
        return self._by_size[block_size]
