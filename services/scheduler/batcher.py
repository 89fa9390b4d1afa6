"""The engine of a replica without its I/O: requests in, steps out, results in, tokens out.

    submit ─► queue ─► plan ─► ledger ─► AppliedStep ─► [shard] ─► commit ─► sink

Single-threaded and synchronous; the clock is a function it was given. `replica.py` carries steps
and results over the wire and calls `break_epoch` and `open_epoch` around failures.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from infermesh.errors import (
    DeadlineExceeded,
    MeshError,
    OutOfMemory,
    Poisoned,
    ProtocolViolation,
)
from infermesh.v1 import shard_service_pb2
from services.scheduler import results
from services.scheduler.bookings import Bookings
from services.scheduler.eviction import NUM_CLASSES
from services.scheduler.fairness import charge_known
from services.scheduler.ids import StepId
from services.scheduler.intake import ModelFacts, Submission, check_input, check_load
from services.scheduler.ledger import AppliedStep, Capacity, Ledger
from services.scheduler.pace import Throughput
from services.scheduler.plan import plan
from services.scheduler.queue import SHARES, WaitingQueue
from services.scheduler.roster import Roster
from services.scheduler.sequence import MoveReason, Request, Sink
from services.scheduler.stats import Stats
from services.scheduler.step_plan import Limits, PlanState, StepPlan
from services.scheduler.suspects import Suspects
from services.scheduler.token_budget import TokenBudget

# Of short steps.
MAX_WINDOW = 4


@dataclass(frozen=True, slots=True)
class BatcherSettings:
    """What the operator chose."""

    # Steps in flight; more, up to `MAX_WINDOW`, where together they take less than `lead_s`.
    window: int = 2
    lead_s: float = 0.0
    max_queue_tokens: int = 262_144
    # By priority, how full the queue may be for a newcomer.
    queue_shares: Mapping[int, float] = field(default_factory=lambda: SHARES)
    enable_prefix_caching: bool = True
    # Of `Eviction`; 1 is plain LRU.
    eviction_classes: int = NUM_CLASSES
    max_crashes_per_request: int = 2
    # How long a step with decodes may take; None: as long as a full one does.
    target_itl_s: float | None = None

    @property
    def max_window(self) -> int:
        """Steps that are ever in flight."""
        return max(self.window, MAX_WINDOW) if self.lead_s else self.window


class Batcher:
    """Continuous batching over one device."""

    def __init__(
        self,
        settings: BatcherSettings,
        model: ModelFacts,
        capacity: Capacity,
        stats: Stats,
        clock: Callable[[], float],
    ) -> None:
        self.settings = settings
        self.roster = Roster(
            model,
            Ledger(
                capacity,
                settings.enable_prefix_caching,
                model.rope_switch_len,
                settings.eviction_classes,
            ),
            WaitingQueue(settings.max_queue_tokens, settings.queue_shares),
            Suspects(settings.max_crashes_per_request),
            stats,
            clock,
        )
        self.throughput = Throughput()  # of everything, for the load report
        self._bookings = Bookings()
        self.token_budget: TokenBudget | None = None
        if settings.target_itl_s is not None:
            self.token_budget = TokenBudget(settings.target_itl_s, capacity.block_size)
        self._last_done_s = 0.0
        # The last plan left somebody waiting, and what had left the queue by then.
        self._is_backlogged = False
        self._num_left = 0
        # The last result left something to do: from then on an idle shard is a bubble.
        self._has_work = False
        self.in_flight: deque[AppliedStep] = deque()
        self._stats = stats
        self._clock = clock
        self._is_open = False
        self._next_step = StepId(1)

    @property
    def is_idle(self) -> bool:
        """Nothing in flight and no request open."""
        return not self.in_flight and not len(self.roster.requests)

    def submit(self, submission: Submission, sink: Sink) -> Request:
        """Accepts a request, told to `sink`.

        Raises:
            MeshError: it is refused, and why.
        """
        check_input(submission, self.roster.model)
        roster = self.roster
        capacity, queue, pace = roster.ledger.capacity, roster.queue, roster.pace
        check_load(submission, capacity, queue, pace, self._bookings, self._clock())
        request = roster.admit(submission, sink)
        roster.requests.flush()
        return request

    def cancel(self, request: Request, choices: Collection[int] = ()) -> None:
        """Ends a request, or these choices of it, that nobody wants any more."""
        self.roster.cancel(request, choices)
        self.roster.requests.flush()
        self._show_occupied()

    def fail_all(self, error: MeshError) -> None:
        """Ends every open request."""
        for request in self.roster.requests:
            self.roster.fail(request, error)
        self.roster.requests.flush()

    def offer(self, requests: Iterable[Request], reason: MoveReason) -> None:
        """Tells gateways that these had better go on elsewhere; they stay until cancelled."""
        for request in requests:
            request.sink.moved(request, reason)
            self.roster.requests.touch(request.sink)
            self._stats.moved(reason)
        self.roster.requests.flush()

    def next_deadline_s(self) -> float | None:
        """When `expire` has to be called next."""
        return self.roster.requests.next_deadline_s()

    def expire(self) -> None:
        """Ends the requests whose deadline has passed, waiting or running."""
        for request in self.roster.requests.overdue(self._clock()):
            self.roster.fail(request, DeadlineExceeded("the request's deadline passed"))
        self.roster.requests.flush()

    def next_step(self) -> AppliedStep | None:
        """Plans and applies one step; None where the window is full or nothing can run."""
        while self._is_open and self._wants_another():
            started_s = self._clock()
            step_plan = plan(self._plan_state(), self._limits())
            for sequence, block_hash in step_plan.deferred:
                sequence.waits_for = block_hash
            if step_plan.is_empty and not step_plan.frees_places:
                return None
            step = self._apply(step_plan)
            self._stats.planned(self._clock() - started_s)
            if step is not None:
                return step
        return None

    def commit(self, result: shard_service_pb2.StepResult) -> None:
        """Takes the result of the oldest step in flight.

        Raises:
            ProtocolViolation: it is not that step's result; nothing was changed.
        """
        if not self.in_flight:
            raise ProtocolViolation(f"result of step {result.step_id}; none is in flight")
        step = self.in_flight[0]
        results.verify(step, result)
        self.in_flight.popleft()
        num_kept = results.take(self.roster, step, result, self.in_flight)
        now_s = self._clock()
        self.roster.ledger.pool.step_executed(step.step_id)
        self._learn(step, result)
        self._measure(step, now_s)
        self._stats.executed(step, num_kept, now_s - step.planned_s)
        self._show_occupied()
        self.roster.requests.flush()
        timings = result.timings
        bubble_us = timings.idle_us if self._has_work else 0
        self._stats.device_time.spent(timings.execute_us / 1e6, bubble_us / 1e6)
        self._has_work = not self.is_idle
        if not self._has_work:
            self.roster.ledger.check_idle()

    def break_epoch(self, by_a_step: bool) -> None:
        """The step stream broke: everybody waits again, and what was not answered never happened.

        `by_a_step`: a step may have caused it, so those in the unanswered ones are counted.
        """
        self._is_open = False
        roster = self.roster
        in_steps = dict.fromkeys(
            row.placement.sequence for step in self.in_flight for row in step.rows
        )
        self.in_flight.clear()
        for sequence in in_steps:
            sequence.num_in_flight = 0
        lost = roster.ledger.break_steps()
        roster.restart(lost)
        self._stats.replayed(len(lost))
        if by_a_step:
            convict = roster.suspects.record_break(s for s in in_steps if not s.is_over)
            if convict is not None:
                roster.fail(convict.request, Poisoned("the request broke the device, also alone"))
        roster.requests.flush()

    def open_epoch(self, capacity: Capacity, contents_survive: bool) -> None:
        """A new epoch is open; steps count from 1. Without contents, all prefixes are forgotten."""
        assert not self.in_flight, "an epoch opens after the one before was broken"
        if not contents_survive or capacity != self.roster.ledger.capacity:
            settings = self.settings
            self.roster.reset_device(
                capacity, settings.enable_prefix_caching, settings.eviction_classes
            )
        self._next_step = StepId(1)
        self._has_work = False  # no step was due while the epoch was being opened
        self._is_open = True
        self._stats.epoch_opened()
        self._stats.served.capacity(capacity)
        self._show_occupied()

    def _wants_another(self) -> bool:
        """A step that is sent early keeps the shard from waiting; one sent late knows more."""
        num_steps, settings = len(self.in_flight), self.settings
        if num_steps < settings.window:
            return True
        step_s = self.roster.pace.step_s
        short = step_s is not None and num_steps * step_s < settings.lead_s
        return short and num_steps < settings.max_window

    def _show_occupied(self) -> None:
        self._stats.occupied(self.roster.ledger, self.roster.queue)

    def _apply(self, step_plan: StepPlan) -> AppliedStep | None:
        roster, now_s = self.roster, self._clock()
        for admission in step_plan.admissions:
            sequence, start = admission.sequence, admission.start
            if roster.queue.admit(sequence):
                self._stats.overtook()
            self._stats.admitted(sequence, start, roster.ledger.capacity.block_size)
            if sequence.cached_prompt_tokens is None:
                sequence.cached_prompt_tokens = min(start.num_computed, sequence.prompt_len)
                sequence.timeline.first_step_s = now_s
        step = roster.ledger.apply(step_plan, self._next_step, now_s)
        for row in step.rows[step.num_decodes :]:
            if not row.from_last:
                charge_known(row.placement.sequence, row.first, row.end)
        for sequence in step_plan.preempted:
            roster.preempt(sequence)
        for sequence in step_plan.out_of_memory:
            message = "the sequence needs more KV blocks than this replica has"
            roster.fail(sequence.request, OutOfMemory(message))
        self._is_backlogged = len(roster.queue) > 0
        if not step.rows:
            return None
        self._next_step = StepId(self._next_step + 1)
        self.in_flight.append(step)
        return step

    def _learn(self, step: AppliedStep, result: shard_service_pb2.StepResult) -> None:
        """What a step says of how long steps take, by the device's own clock."""
        timings = result.timings
        has_run = all(row.status == shard_service_pb2.ROW_STATUS_OK for row in result.rows)
        if self.token_budget is None or not has_run or not timings.execute_us:
            return
        took_us = timings.execute_us
        if step.planned_s < self._last_done_s:  # sent while another ran: streams waited for it
            took_us += timings.idle_us
        self.token_budget.took([(row.first, row.end) for row in step.rows], took_us / 1e6)
        self._stats.device_time.paced(step, took_us / 1e6, self.token_budget.target_s)

    def _measure(self, step: AppliedStep, now_s: float) -> None:
        """What a step says of the pace: of prompts only if it was nearly full of them."""
        began_s, self._last_done_s = max(step.planned_s, self._last_done_s), now_s
        self.throughput.record(began_s, now_s, step.num_tokens)
        pace, queue = self.roster.pace, self.roster.queue
        pace.step(now_s - began_s)
        pace.known_per_step = step.budget - (step.num_tokens - step.num_known)
        if self._is_backlogged:
            pace.left_queue(began_s, now_s, queue.num_tokens_admitted - self._num_left)
        else:
            pace.queue_emptied()
        self._num_left = queue.num_tokens_admitted
        if 4 * step.num_tokens >= 3 * step.budget and 2 * step.num_known >= step.num_tokens:
            pace.computed(began_s, now_s, step.num_known)

    def _plan_state(self) -> PlanState:
        roster = self.roster
        return PlanState(
            running=roster.ledger.running,
            waiting=roster.queue,
            pool=roster.ledger.pool,
            cache=roster.ledger.cache,
            num_free_slots=roster.ledger.num_free_slots,
            num_steps_in_flight=len(self.in_flight),
            solo=roster.suspects.solo,
        )

    def _limits(self) -> Limits:
        capacity = self.roster.ledger.capacity
        return Limits(
            capacity.max_batch_tokens,
            capacity.block_size,
            rope_switch_len=self.roster.ledger.rope_switch_len,
            target=self.token_budget.target() if self.token_budget is not None else None,
        )
