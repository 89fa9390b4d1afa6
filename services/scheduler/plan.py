"""What the next step runs. A pure function over plain data: no clock, no I/O, nothing is changed.

A step maps sequences to numbers of tokens; there are no prefill or decode phases. In order:

1. Running sequences with one token to go (decodes): a long prompt never stalls running streams.
2. Class by class, in it tenant by tenant, who was served least first: chunks of prompts that run
   already, then admissions from the waiting queue.
3. A sequence that outgrew its rotary tables gives up its place, to be computed anew.
4. Where a running sequence needs a block and none is left, one is preempted: of the lowest class,
   of the tenant that was served most, the youngest.

Whose turn it is is `WaitingQueue`'s affair, what a plan does to the books `Ledger`'s.
"""

from __future__ import annotations

from collections.abc import Container

from infermesh.block_hash import BlockHash
from services.scheduler.draft import Draft
from services.scheduler.fairness import Turns, cost_of_known, counter_of
from services.scheduler.ids import BlockId
from services.scheduler.prefix_cache import PrefixCache
from services.scheduler.queue import PRIORITIES
from services.scheduler.sequence import Placement, Sequence
from services.scheduler.step_plan import (
    Admission,
    Limits,
    PlannedRow,
    PlanState,
    Shortage,
    Start,
    StepPlan,
)

# Of so many slots one is kept for a tenant that runs nothing, where tenants share the replica.
_SLOTS_PER_SPARE = 16


def plan(state: PlanState, limits: Limits) -> StepPlan:
    """The next step; empty where nothing can run now."""
    draft = Draft(
        state, limits, limits.max_batch_tokens, state.pool.num_available, state.pool.has_quarantine
    )
    decodes, prefills = _split_running(draft)
    _plan_decodes(draft, decodes)
    draft.start_clock()
    for priority in PRIORITIES:
        _plan_class(draft, priority, prefills[priority])
    return draft.finish()


def find_start(
    sequence: Sequence,
    cache: PrefixCache,
    block_size: int,
    claimed: Container[BlockId] = frozenset(),
) -> tuple[Start, BlockHash | None]:
    """The most that `sequence` need not compute, and the first block hash that was missing.

    At least its last known token is left to compute: logits come from there. A fork takes its
    sibling's prompt up to the last token, which it computes itself. One block, one writer: a block
    of which a part is needed is copied, unless it is a tail that nobody holds, nor has `claimed`.
    """
    max_blocks = (len(sequence.token_ids) - 1) // block_size
    match = cache.match(sequence.block_hashes, max_blocks)
    start = Start(len(match.block_ids) * block_size, match.block_ids)
    fork_at = sequence.prompt_len - 1
    leader = leader_of(sequence)
    if leader is not None and leader.sequence.is_long != sequence.is_long:
        leader = None
    if leader is None or leader.num_planned < fork_at or start.num_computed >= fork_at:
        return _with_part(start, sequence, cache, block_size, claimed), match.missing
    full, rest = divmod(fork_at, block_size)
    source = leader.block_ids[full] if rest else None
    return Start(fork_at, leader.block_ids[:full], source, leader), None


def _with_part(
    start: Start,
    sequence: Sequence,
    cache: PrefixCache,
    block_size: int,
    claimed: Container[BlockId],
) -> Start:
    """Adds what a block that is kept has of the sequence's next block."""
    first, shared = start.num_computed, start.shared
    end = min(first + block_size, len(sequence.token_ids) - 1)
    part = cache.find_part(sequence.parent_hash(len(shared)), sequence.token_ids[first:end])
    if part is None:
        return start
    if part.is_idle_tail and part.block_id not in claimed:
        return Start(first + part.num_tokens, shared, tail=part.block_id)
    return Start(first + part.num_tokens, shared, copy_from=part.block_id)


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
    block_size, rows = draft.limits.block_size, draft.rows
    growing: list[PlannedRow] = []
    short: list[Sequence] = []
    for sequence in decodes[: draft.budget]:
        place = sequence.placement
        assert place is not None
        if place.num_planned < len(place.block_ids) * block_size:
            rows.append(PlannedRow(sequence, 1, 0))
        elif draft.available > 0:
            draft.available -= 1
            growing.append(PlannedRow(sequence, 1, 1))
        else:
            short.append(sequence)
    rows += growing  # behind the others, which the wire packs
    draft.budget -= len(rows)
    for sequence in short:
        if sequence not in draft.preempted and draft.make_room(sequence):
            draft.available -= 1
            draft.budget -= 1
            draft.rows.append(PlannedRow(sequence, 1, 1))


def _plan_class(draft: Draft, priority: int, prefills: list[Sequence]) -> None:
    """Gives the budget that is left to one class, turn by turn, until one does not fit."""
    if draft.is_full:
        return
    turns = _turns(draft, priority, prefills)
    for sequence in turns:
        if sequence.placement is not None:
            _plan_prefill(draft, sequence, turns)
        elif draft.is_closed or draft.num_looked_at >= draft.limits.max_candidates:
            turns.close()  # others may have chunks to go
        elif _must_leave_slots(draft, sequence):
            if not _must_wait(draft, sequence):
                draft.yield_to(sequence)  # what it gives up is no spare
                draft.shortage = Shortage.SLOTS
            turns.end_line()
        else:
            draft.num_looked_at += 1
            if not _must_wait(draft, sequence):
                _try_admit(draft, sequence, turns)
        if draft.is_full:
            return
        if draft.is_closed:
            turns.close()


def _turns(draft: Draft, priority: int, prefills: list[Sequence]) -> Turns:
    """The order of one class; a suspect is admitted alone, onto an idle device."""
    waiting, solo = draft.state.waiting, draft.state.solo
    if solo is None:
        return waiting.turns(priority, prefills, is_open=not draft.is_closed)
    if solo.placement is None and draft.state.num_steps_in_flight == 0:
        prefills = [*prefills, solo] if solo.priority == priority else prefills
    return waiting.turns(priority, prefills, is_open=False)


def _plan_prefill(draft: Draft, sequence: Sequence, turns: Turns) -> None:
    place = sequence.placement
    assert place is not None
    most = draft.most_from(place.num_planned)
    if sequence in draft.preempted or most < 1:
        return
    held, block_size = len(place.block_ids), draft.limits.block_size
    is_short = (held + draft.available) * block_size <= place.num_planned
    if is_short and not draft.make_room(sequence):
        return
    room = (held + draft.available) * block_size - place.num_planned
    count = min(place.end - place.num_planned, most, room)
    new_blocks = max(0, draft.blocks_for(place.num_planned + count) - held)
    draft.take_known(place.num_planned, count, new_blocks)
    draft.committed -= new_blocks
    draft.rows.append(PlannedRow(sequence, count, new_blocks))
    turns.charge(cost_of_known(sequence, place.num_planned, place.num_planned + count))


def _must_leave_slots(draft: Draft, sequence: Sequence) -> bool:
    """True where the last slots are for tenants that run nothing: else who sends little would wait
    until one of the many sequences of a tenant that sends much has ended.
    """
    state = draft.state
    num_left = state.num_free_slots - len(draft.admissions)
    if num_left <= 0 or num_left > (state.num_free_slots + len(state.running)) // _SLOTS_PER_SPARE:
        return False
    num_admitted = sum(one.sequence.account is sequence.account for one in draft.admissions)
    return state.waiting.runs_beside_others(sequence, num_admitted)


def _must_wait(draft: Draft, sequence: Sequence) -> bool:
    """True where waiting is cheaper than running, or it is not this one's turn."""
    if sequence.num_in_flight:
        return True
    awaited = sequence.waits_for  # by a lower class it may never be computed
    if awaited is not None and draft.state.cache.filling.get(awaited, 0) >= sequence.priority:
        return True
    if len(sequence.request.sequences) == 1:
        return False
    leader = leader_of(sequence)
    if leader is not None:  # until the leader's prompt is on its way
        return leader.num_planned < sequence.prompt_len
    return any(other.sequence.request is sequence.request for other in draft.admissions)


def _try_admit(draft: Draft, sequence: Sequence, turns: Turns) -> None:
    state, known = draft.state, len(sequence.token_ids)
    if draft.blocks_for(known) > state.pool.num_blocks:
        draft.out_of_memory.append(sequence)
        return
    block_size = draft.limits.block_size
    start, missing = find_start(sequence, state.cache, block_size, draft.claimed)
    if missing is not None and (
        state.cache.filling.get(missing, 0) >= sequence.priority or missing in draft.filling
    ):
        draft.deferred.append((sequence, missing))
        return
    start = _without_copy_if_short(draft, sequence, start)
    most = draft.most_from(start.num_computed)
    if most < 1:  # what is left of the time is too short for a token so far on
        draft.shortage = Shortage.TOKENS
        return
    idle = draft.idle(start.touched)
    available = draft.available - len(idle)
    if (shortage := _shortage(draft, sequence, start, available)) is not None:
        draft.shortage = shortage
        draft.is_closed = True
        draft.yield_to(sequence)
        return
    draft.available = available
    draft.claimed.update(idle)
    held = len(start.held)
    room = (held + available) * block_size - start.num_computed
    count = min(known - start.num_computed, most, room)
    new_blocks = draft.blocks_for(start.num_computed + count) - held
    draft.take_known(start.num_computed, count, new_blocks)
    draft.committed += draft.blocks_for(known + 1) - held - new_blocks
    draft.filling.update(sequence.block_hashes[len(start.shared) :])
    draft.admissions.append(Admission(sequence, start, count, new_blocks))
    turns.charge(cost_of_known(sequence, start.num_computed, start.num_computed + count))


def _without_copy_if_short(draft: Draft, sequence: Sequence, start: Start) -> Start:
    """A kept block that is copied can't be given up for the step: where that is one too many, its
    part is computed."""
    if start.leader is not None or start.copy_from is None:
        return start
    idle = draft.idle(start.touched)
    if start.copy_from not in idle:
        return start
    if _has_room(draft, sequence, start, draft.available - len(idle)):
        return start
    return Start(len(start.shared) * draft.limits.block_size, start.shared)


def _shortage(draft: Draft, sequence: Sequence, start: Start, available: int) -> Shortage | None:
    """What is missing: a slot, or room; who is all alone need not have it."""
    state = draft.state
    if state.num_free_slots <= len(draft.admissions):
        return Shortage.SLOTS
    if not state.running and not draft.admissions and state.pool.num_used == 0:
        return None
    return None if _has_room(draft, sequence, start, available) else Shortage.KV_BLOCKS


def _has_room(draft: Draft, sequence: Sequence, start: Start, available: int) -> bool:
    """Room for all it knows, for what runs already, and one block for each that runs.

    The margin keeps a sequence that was just preempted from being admitted and preempted again.
    """
    num_running = len(draft.state.running) + len(draft.admissions)
    needed = draft.blocks_for(len(sequence.token_ids) + 1) - len(start.held)
    return available - draft.committed - num_running >= needed


def _turn(sequence: Sequence) -> tuple[int, float, int]:
    assert sequence.placement is not None
    return -sequence.priority, counter_of(sequence), sequence.placement.last_turn
