"""What the next step runs. A pure function over plain data: no clock, no I/O, nothing is changed.

A step maps sequences to numbers of tokens; there are no prefill or decode phases. In order:

1. Running sequences with one token to go (decodes): a long prompt never stalls running streams.
2. Class by class: chunks of prompts that run already, then admissions from the waiting queue.
3. A sequence that outgrew its rotary tables gives up its place, to be computed anew.
4. Where a running sequence needs a block and none is left, the lowest, youngest one is preempted.

Who waits in which order is `WaitingQueue`'s affair, what a plan does to the books `Ledger`'s.
"""

from __future__ import annotations

from services.scheduler.draft import Draft
from services.scheduler.ids import BlockHash
from services.scheduler.prefix_cache import PrefixCache
from services.scheduler.queue import PRIORITIES
from services.scheduler.sequence import Placement, Sequence
from services.scheduler.step_plan import Admission, Limits, PlannedRow, PlanState, Start, StepPlan


def plan(state: PlanState, limits: Limits) -> StepPlan:
    """The next step; empty where nothing can run now."""
    draft = Draft(
        state, limits, limits.max_batch_tokens, state.pool.num_available, state.pool.has_quarantine
    )
    decodes, prefills = _split_running(draft)
    _plan_decodes(draft, decodes)
    for priority in PRIORITIES:
        for sequence in prefills[priority]:
            _plan_prefill(draft, sequence)
        _admit_class(draft, priority)
    return draft.finish()


def find_start(
    sequence: Sequence, cache: PrefixCache, block_size: int
) -> tuple[Start, BlockHash | None]:
    """The most that `sequence` need not compute, and the first block hash that was missing.

    At least its last known token is left to compute: logits come from there. A fork takes its
    sibling's prompt up to the last token, which it computes itself: one block, one writer.
    """
    max_blocks = (len(sequence.token_ids) - 1) // block_size
    match = cache.match(sequence.block_hashes, max_blocks)
    start = Start(len(match.block_ids) * block_size, match.block_ids)
    fork_at = sequence.prompt_len - 1
    leader = leader_of(sequence)
    if leader is not None and leader.sequence.is_long != sequence.is_long:
        return start, match.missing
    if leader is None or leader.num_planned < fork_at or start.num_computed >= fork_at:
        return start, match.missing
    full, rest = divmod(fork_at, block_size)
    source = leader.block_ids[full] if rest else None
    return Start(fork_at, leader.block_ids[:full], source, leader), None


def leader_of(sequence: Sequence) -> Placement | None:
    """The running choice of the same request that is furthest, if one runs."""
    best: Placement | None = None
    siblings = sequence.request.sequences
    if len(siblings) > 1:
        for sibling in siblings:
            place = sibling.placement
            if place is not None and (best is None or place.num_planned > best.num_planned):
                best = place
    return best


def _split_running(draft: Draft) -> tuple[list[Sequence], dict[int, list[Sequence]]]:
    """Those with one token to go, and those with more; finished lengths are left out."""
    decodes: list[Sequence] = []
    prefills: dict[int, list[Sequence]] = {priority: [] for priority in PRIORITIES}
    for sequence in draft.state.running:
        place = sequence.placement
        assert place is not None
        end = len(sequence.token_ids) + place.num_sampling
        if end >= sequence.max_len:  # its last token is on its way
            draft.blocks_coming = True
            continue
        if 0 < draft.limits.rope_switch_len < end and not sequence.is_long:
            draft.retire_outgrown(sequence)
            continue
        if end - place.num_planned == 1:
            decodes.append(sequence)
        else:
            prefills[sequence.priority].append(sequence)
            draft.committed += draft.blocks_for(end + 1) - len(place.block_ids)
    return decodes, prefills


def _plan_decodes(draft: Draft, decodes: list[Sequence]) -> None:
    if len(decodes) > draft.budget:  # take turns
        decodes.sort(key=_turn)
    block_size = draft.limits.block_size
    short: list[Sequence] = []
    for sequence in decodes[: draft.budget]:
        place = sequence.placement
        assert place is not None
        if place.num_planned < len(place.block_ids) * block_size:
            draft.rows.append(PlannedRow(sequence, 1, 0))
        elif draft.available > 0:
            draft.available -= 1
            draft.rows.append(PlannedRow(sequence, 1, 1))
        else:
            short.append(sequence)
    draft.budget -= len(draft.rows)
    for sequence in short:
        if sequence not in draft.preempted and draft.make_room(sequence):
            draft.available -= 1
            draft.budget -= 1
            draft.rows.append(PlannedRow(sequence, 1, 1))


def _plan_prefill(draft: Draft, sequence: Sequence) -> None:
    place = sequence.placement
    assert place is not None
    if draft.budget <= 0 or sequence in draft.preempted:
        return
    held, block_size = len(place.block_ids), draft.limits.block_size
    is_short = (held + draft.available) * block_size <= place.num_planned
    if is_short and not draft.make_room(sequence):
        return
    room = (held + draft.available) * block_size - place.num_planned
    count = min(place.end - place.num_planned, draft.budget, room)
    new_blocks = max(0, draft.blocks_for(place.num_planned + count) - held)
    draft.take(count, new_blocks)
    draft.committed -= new_blocks
    draft.rows.append(PlannedRow(sequence, count, new_blocks))


def _admit_class(draft: Draft, priority: int) -> None:
    """Admits the waiting of one class in their order until one does not fit."""
    line, solo = draft.state.waiting.in_class(priority), draft.state.solo
    if solo is not None:
        alone = solo.placement is None and draft.state.num_steps_in_flight == 0
        line = [solo] if alone and solo.priority == priority else []
    for sequence in line:
        if draft.is_closed or draft.budget <= 0:
            return
        if draft.num_looked_at >= draft.limits.max_candidates:
            return
        draft.num_looked_at += 1
        if not _must_wait(draft, sequence):
            _try_admit(draft, sequence)


def _must_wait(draft: Draft, sequence: Sequence) -> bool:
    """True where waiting is cheaper than running, or it is not this one's turn."""
    if sequence.num_in_flight:
        return True
    if sequence.waits_for is not None and sequence.waits_for in draft.state.cache.filling:
        return True
    if len(sequence.request.sequences) == 1:
        return False
    leader = leader_of(sequence)
    if leader is not None:  # until the leader's prompt is on its way
        return leader.num_planned < sequence.prompt_len
    return any(other.sequence.request is sequence.request for other in draft.admissions)


def _try_admit(draft: Draft, sequence: Sequence) -> None:
    state, known = draft.state, len(sequence.token_ids)
    if draft.blocks_for(known) > state.pool.num_blocks:
        draft.out_of_memory.append(sequence)
        return
    start, missing = find_start(sequence, state.cache, draft.limits.block_size)
    if missing is not None and (missing in state.cache.filling or missing in draft.filling):
        draft.deferred.append((sequence, missing))
        return
    idle = [b for b in start.shared if state.pool.is_cached(b) and b not in draft.claimed]
    available = draft.available - len(idle)
    if not _fits(draft, sequence, start, available):
        draft.is_closed = True
        draft.yield_to(sequence)
        return
    draft.available = available
    draft.claimed.update(idle)
    held = len(start.shared)
    room = (held + available) * draft.limits.block_size - start.num_computed
    count = min(known - start.num_computed, draft.budget, room)
    new_blocks = draft.blocks_for(start.num_computed + count) - held
    draft.take(count, new_blocks)
    draft.committed += draft.blocks_for(known + 1) - held - new_blocks
    draft.filling.update(sequence.block_hashes[held:])
    draft.admissions.append(Admission(sequence, start, count, new_blocks))


def _fits(draft: Draft, sequence: Sequence, start: Start, available: int) -> bool:
    """Room for all it knows, for what runs already, and one block for each that runs.

    The margin keeps a sequence that was just preempted from being admitted and preempted again.
    """
    state = draft.state
    num_running = len(state.running) + len(draft.admissions)
    if state.num_free_slots <= len(draft.admissions):
        return False
    if num_running == 0 and state.pool.num_used == 0:
        return True
    needed = draft.blocks_for(len(sequence.token_ids) + 1) - len(start.shared)
    return available - draft.committed - num_running >= needed


def _turn(sequence: Sequence) -> tuple[int, int]:
    assert sequence.placement is not None
    return -sequence.priority, sequence.placement.last_turn
