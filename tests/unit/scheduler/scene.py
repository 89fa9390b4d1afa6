"""Sequences and one device's books, set up by hand for tests of a part of the scheduler."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

from infermesh.block_hash import scope_hash
from infermesh.errors import MeshError
from services.scheduler.fairness import Account
from services.scheduler.ids import StepId
from services.scheduler.intake import ModelFacts, Submission
from services.scheduler.ledger import AppliedStep, Capacity, Ledger
from services.scheduler.plan import (
    Admission,
    Limits,
    PlannedRow,
    PlanState,
    StepPlan,
    find_start,
    plan,
)
from services.scheduler.queue import WaitingQueue
from services.scheduler.sequence import (
    Ending,
    MoveReason,
    Request,
    Sampling,
    Sequence,
    StopRule,
    Timeline,
)

EOS = 1
MODEL = ModelFacts("model", "print", 64, 100, frozenset({EOS}))


class Recorder:
    """A sink that keeps all it is told."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[int, int], list[int]] = {}
        self.endings: dict[tuple[int, int], Ending] = {}
        self.num_flushes = 0
        self.is_slow = False
        self.offers: dict[int, tuple[MoveReason, int]] = {}

    def accepted(self, stream_id: int, queued_tokens: int) -> None: ...

    def refused(self, stream_id: int, error: MeshError) -> None: ...

    def delta(
        self, sequence: Sequence, start: int, tokens: Seq[int], logprobs: Seq[object]
    ) -> bool:
        key = (sequence.request.stream_id, sequence.choice)
        output = self.outputs.setdefault(key, [])
        assert key not in self.endings, "a token after the end"
        assert start == len(output), "a token lost or doubled"
        output.extend(tokens)
        return not self.is_slow

    def finished(self, sequence: Sequence, end: Ending) -> None:
        key = (sequence.request.stream_id, sequence.choice)
        assert key not in self.endings, "finished twice"
        self.endings[key] = end

    def moved(self, request: Request, reason: MoveReason) -> None:
        self.offers[request.stream_id] = (reason, request.num_crashes)

    def flush(self) -> None:
        self.num_flushes += 1


_SUBMISSION = Submission(
    request_id="request",
    stream_id=1,
    prompt_token_ids=[2, 3, 4],
    choices=[(0, [])],
    sampling=Sampling(None, False),
    max_tokens=8,
    min_tokens=0,
    stop_token_ids=frozenset(),
    ignore_eos=False,
    priority=2,
    tenant="tenant",
    tenant_weight=1.0,
    remaining_s=None,
    sharing_domain="tenant",
    traceparent="",
)


def submission(**changes: Any) -> Submission:
    """A plain submit with these fields changed."""
    return replace(_SUBMISSION, **changes)


def make_request(
    arrival: int,
    prompt: Seq[int],
    *,
    priority: int = 2,
    n: int = 1,
    max_len: int = 1000,
    domain: str = "tenant",
    tenant: str = "tenant",
    weight: float = 1.0,
) -> Request:
    """An open request with its sequences, as RequestBook would make it."""
    request = Request(
        request_id=f"request-{arrival}",
        stream_id=arrival,
        sink=Recorder(),
        prompt_len=len(prompt),
        sampling=Sampling(None, False),
        stop=StopRule(frozenset({EOS}), 0, max_len),
        priority=priority,
        tenant=tenant,
        tenant_weight=weight,
        scope=scope_hash(domain),
        arrival=arrival,
        deadline_s=None,
        traceparent="",
    )
    for choice in range(n):
        request.sequences.append(
            Sequence(
                request=request,
                choice=choice,
                token_ids=list(prompt),
                prompt_len=len(prompt),
                priority=priority,
                order=(arrival, choice),
                max_len=max_len,
                timeline=Timeline(arrived_s=0.0),
            )
        )
    return request


class Scene:
    """A ledger and a queue; sequences are put where a test wants them."""

    def __init__(
        self, num_blocks: int = 16, block_size: int = 4, max_num_seqs: int = 8, caching: bool = True
    ) -> None:
        self.ledger = Ledger(Capacity(num_blocks, block_size, max_num_seqs, 64), caching)
        self.queue = WaitingQueue(10_000)
        self.in_flight: deque[AppliedStep] = deque()
        self._next_step = 1
        self._num_arrived = 0

    def arrive(self, prompt: int | Seq[int], **options: Any) -> Request:
        """A request; a prompt given by its length shares no token with any other."""
        self._num_arrived += 1
        if isinstance(prompt, int):
            prompt = range(1000 * self._num_arrived, 1000 * self._num_arrived + prompt)
        request = make_request(self._num_arrived, prompt, **options)
        for sequence in request.sequences:
            self.ledger.hash_blocks(sequence)
        return request

    def wait(self, prompt: int | Seq[int], **options: Any) -> Sequence:
        """All choices wait; the first is returned."""
        request = self.arrive(prompt, **options)
        for sequence in request.sequences:
            self.queue.push(sequence, len(sequence.token_ids))
        return request.sequences[0]

    def account_of(self, sequence: Sequence) -> Account:
        """Of a sequence that may never have waited here."""
        if sequence.account is None:
            self.queue.push(sequence, 0)
            self.queue.remove(sequence)
        assert sequence.account is not None
        return sequence.account

    def run(
        self,
        prompt: int | Seq[int],
        planned: int | None = None,
        in_flight: bool = False,
        **options: Any,
    ) -> Sequence:
        """The first choice runs, with `planned` tokens of its prompt computed, or in flight."""
        sequence = self.arrive(prompt, **options).sequences[0]
        self.admit(sequence, planned)
        if not in_flight:
            self.execute()
        return sequence

    def admit(self, sequence: Sequence, planned: int | None = None) -> AppliedStep:
        """Gives a sequence a place in a step of its own."""
        size = self.ledger.capacity.block_size
        start, _ = find_start(sequence, self.ledger.cache, size)
        end = sequence.prompt_len if planned is None else planned
        num_new = -(-end // size) - len(start.held)
        admission = Admission(sequence, start, end - start.num_computed, num_new)
        return self.apply(StepPlan([], [admission], [], [], []))

    def decode(self, *sequences: Sequence) -> AppliedStep:
        """A step in which these get one token each; their blocks have room for it."""
        return self.apply(StepPlan([PlannedRow(s, 1, 0) for s in sequences], [], [], [], []))

    def decode_more(self, sequence: Sequence) -> None:
        """One token more, with a block for it where it needs one, and the step has run."""
        place = sequence.placement
        assert place is not None
        is_full = place.num_planned == len(place.block_ids) * self.ledger.capacity.block_size
        self.apply(StepPlan([PlannedRow(sequence, 1, int(is_full))], [], [], [], []))
        self.execute()

    def apply(self, step_plan: StepPlan) -> AppliedStep:
        for admission in step_plan.admissions:
            if admission.sequence in self.queue:
                self.queue.remove(admission.sequence)
        step = self.ledger.apply(step_plan, StepId(self._next_step), 0.0)
        for sequence in step_plan.preempted:
            self.queue.push(sequence, len(sequence.token_ids))
        if step.rows:
            self._next_step += 1
            self.in_flight.append(step)
        return step

    def execute(self) -> None:
        """The oldest step has run; each row that samples yields token 99."""
        step = self.in_flight.popleft()
        for row in step.rows:
            place = row.placement
            place.sequence.num_in_flight -= 1
            place.num_sampling -= row.samples
            self.ledger.executed(place, row.end, step.step_id)
            if row.samples and not place.sequence.is_over:
                place.sequence.token_ids.append(99)
        self.ledger.pool.step_executed(step.step_id)

    def finish(self, sequence: Sequence) -> None:
        """It is over and gives its place back."""
        sequence.is_over = True
        assert sequence.placement is not None
        self.ledger.retire(sequence.placement)

    def state(self, solo: Sequence | None = None) -> PlanState:
        return PlanState(
            running=self.ledger.running,
            waiting=self.queue,
            pool=self.ledger.pool,
            cache=self.ledger.cache,
            num_free_slots=self.ledger.num_free_slots,
            num_steps_in_flight=len(self.in_flight),
            solo=solo,
        )

    def plan(
        self, budget: int = 64, solo: Sequence | None = None, max_candidates: int = 256
    ) -> StepPlan:
        """What the planner would do now; nothing is applied."""
        limits = Limits(budget, self.ledger.capacity.block_size, max_candidates)
        return plan(self.state(solo), limits)

    def fill_pool(self, leave: int = 0) -> None:
        """Somebody outside the story holds all free blocks but `leave`."""
        self.ledger.pool.allocate(self.ledger.pool.num_available - leave)


def row_counts(step_plan: StepPlan) -> list[tuple[Sequence, int]]:
    """Who gets how many tokens as a running sequence."""
    return [(row.sequence, row.num_tokens) for row in step_plan.rows]


def admitted(step_plan: StepPlan) -> list[Sequence]:
    """Who gets a place."""
    return [admission.sequence for admission in step_plan.admissions]
