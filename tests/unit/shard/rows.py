"""Active rows for tests of what comes after the slots."""

from __future__ import annotations

from collections.abc import Sequence

from services.shard.domain import BlockId, NewSequence, Sampling, Slot
from services.shard.history import TokenHistory
from services.shard.slots import ActiveRow, SequenceState


def active_row(
    sampling: Sampling,
    *,
    slot: int = 0,
    choice: int = 0,
    start: int = 0,
    token_ids: Sequence[int] = (1,),
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    prompt_len: int | None = None,
    min_tokens: int = 0,
    suppressed: Sequence[int] = (),
    block_ids: Sequence[int] = (),
    sample: bool = True,
    long_rope: bool = False,
    traceparent: str = "",
) -> ActiveRow:
    """A row as the slot table would make it."""
    new = NewSequence(
        slot=Slot(slot),
        block_ids=[BlockId(block) for block in block_ids],
        num_computed_tokens=start,
        prompt_len=len(prompt) if prompt_len is None else prompt_len,
        choice=choice,
        sampling=sampling,
        min_tokens=min_tokens,
        suppressed_token_ids=suppressed,
        traceparent=traceparent,
        long_rope=long_rope,
    )
    history = TokenHistory(prompt, output) if sampling.penalizes else None
    sequence = SequenceState(new, start, len(block_ids), history)
    return ActiveRow(0, sequence, token_ids, start, sample)
