"""Drives one generation to its end over as many attempts as it takes.

When a replica is lost, the tokens delivered so far are resubmitted with the prompt, so that nothing
is lost and nothing comes twice. Only what was promised (accepted once) waits for a replica.
"""

import asyncio
from collections.abc import Callable, Sequence

from gateway import metrics
from gateway.fleet import Fleet
from gateway.generation import Generation
from gateway.replica.client import ReplicaClient
from gateway.replica.translate import Submission
from gateway.request import StopRules
from gateway.tokens import Finish, FinishReason, Start, TokenLogprobs
from infermesh.errors import (
    MeshError,
    Poisoned,
    ProtocolViolation,
    QueueFull,
    ReplicaUnavailable,
    Unavailable,
    as_mesh_error,
)
from infermesh.telemetry import logs

_log = logs.get(__name__)
MAX_BREAKS = 3
_RETRY_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.0
# Another replica may take what one refuses or gives up for these reasons. They are no crash: a
# rolling restart may give up a long stream any number of times.
_ELSEWHERE = (Unavailable, QueueFull)


class Broken(Exception):
    """An attempt ended without its choices having finished; what was delivered stands."""

    def __init__(self, cause: MeshError) -> None:
        super().__init__(cause.message)
        self.cause = cause


class AttemptSink:
    """Hands one attempt's events to the generation and notes how the attempt ended."""

    def __init__(self, generation: Generation, replica: ReplicaClient) -> None:
        self._generation = generation
        self._replica = replica
        self._outcome: asyncio.Future[MeshError | Broken | None] = (
            asyncio.get_running_loop().create_future()
        )

    async def ended(self) -> None:
        """Returns when every choice has finished or was dropped.

        Raises:
            Broken: the attempt was lost.
            MeshError: the replica refused the request, failed it, or gave it up.
        """
        outcome = await self._outcome
        if outcome is not None:
            raise outcome

    def on_accepted(self) -> None:
        self._generation.accept(self._replica.replica_id)

    def on_refused(self, error: MeshError) -> None:
        self._end(error)

    def on_started(self, choice: int, start: Start) -> None:
        if not self._outcome.done():
            self._generation.start(choice, start)

    def on_delta(
        self, choice: int, start: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> None:
        if self._outcome.done() or self._generation.was_dropped(choice):
            return
        try:
            self._generation.extend(choice, start, token_ids, logprobs)
        except ProtocolViolation as violation:
            self._end(Broken(violation))

    def on_finished(self, choice: int, end: Finish | MeshError) -> None:
        if self._outcome.done() or self._generation.was_dropped(choice):
            return
        if isinstance(end, MeshError):
            self._end(end)
            return
        if end.reason is FinishReason.CANCELLED:  # not by us: we would not listen any more
            self._end(ReplicaUnavailable("the replica cancelled the request"))
            return
        try:
            self._generation.finish(choice, end)
        except ProtocolViolation as violation:
            self._end(Broken(violation))
            return
        if self._generation.ended:
            self._end(None)

    def on_broken(self, error: MeshError) -> None:
        self._end(Broken(error))

    def on_dropped(self) -> None:
        """A choice is not wanted any more, maybe the last open one."""
        if self._generation.ended:
            self._end(None)

    def _end(self, outcome: MeshError | Broken | None) -> None:
        if not self._outcome.done():
            self._outcome.set_result(outcome)


class Driver:
    """Runs one generation.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, generation: Generation, fleet: Fleet, clock: Callable[[], float]) -> None:
        self._generation = generation
        self._fleet = fleet
        self._clock = clock
        self._attempt = 0
        self._breaks = 0
        self._last_cause: MeshError | None = None
        self._refusing: dict[ReplicaClient, MeshError] = {}
        self._pause_s = _RETRY_PAUSE_S

    async def run(self) -> None:
        """Ends with the generation finished or failed; raises only when cancelled."""
        try:
            while not self._generation.ended:
                replica = await self._next_replica()
                if not self._generation.ended:  # its last choice may have been dropped meanwhile
                    await self._try_once(replica)
        except MeshError as error:
            self._generation.fail(error)
        except Exception as exc:
            _log.exception("a generation's driver failed", extra=self._fields())
            self._generation.fail(as_mesh_error(exc))

    async def _try_once(self, replica: ReplicaClient) -> None:
        """One attempt. Returns also where another one is needed."""
        generation, job = self._generation, self._generation.job
        submission = Submission(
            job=job,
            attempt=self._attempt,
            delivered=[(i, generation.choices[i].token_ids) for i in generation.open_choices()],
            remaining_s=None if job.deadline is None else job.deadline - self._clock(),
        )
        if self._last_cause is not None:
            metrics.FAILOVERS.labels(self._last_cause.code).inc()
        self._attempt += 1
        sink = AttemptSink(generation, replica)
        attempt = replica.submit(submission, sink)

        def drop(choice: int) -> None:
            attempt.cancel_choice(choice)
            sink.on_dropped()

        generation.on_dropped = drop
        try:
            await sink.ended()
            if not any(choice.dropped for choice in generation.choices):
                attempt.release()  # else a dropped one may run yet: `cancel` below
        except Broken as broken:
            self._on_break(replica, broken.cause)
        except _ELSEWHERE as refusal:
            self._refusing[replica] = self._last_cause = refusal
            self._end_what_is_complete()
        finally:
            attempt.cancel()

    async def _next_replica(self) -> ReplicaClient:
        """Where to try next; for a generation that was accepted before, waits for a replica.

        Raises:
            MeshError: nothing can take the job, and nothing was promised; or nothing ever will.
        """
        fingerprint = self._generation.job.fingerprint
        while True:
            replica = self._fleet.pick(fingerprint, self._refusing)
            if replica is not None:
                return replica
            if not self._generation.accepted:
                raise next(iter(self._refusing.values()), self._fleet.why_none(fingerprint))
            if not self._fleet.may_return(fingerprint):
                raise self._fleet.why_gone(fingerprint)
            await self._fleet.changed(self._pause_s)
            self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
            self._refusing.clear()

    def _on_break(self, replica: ReplicaClient, cause: MeshError) -> None:
        self._breaks += 1
        self._last_cause = cause
        _log.warning(
            "attempt lost", extra={**self._fields(), "replica": replica.address, "why": cause.code}
        )
        self._end_what_is_complete()
        if self._generation.ended or self._breaks < MAX_BREAKS:
            return
        if self._generation.accepted:
            raise Poisoned(f"the request was in flight at {self._breaks} losses of its replica")
        raise ReplicaUnavailable(f"the replica was lost {self._breaks} times before it answered")

    def _end_what_is_complete(self) -> None:
        """A choice whose last token was delivered needs no other replica to say that it ended."""
        model = next(
            (
                c.model
                for c in self._fleet.clients
                if c.model and c.model.fingerprint == self._generation.job.fingerprint
            ),
            None,
        )
        eos = model.eos_token_ids if model else frozenset()
        for index in self._generation.open_choices():
            finish = natural_end(
                self._generation.choices[index].token_ids, self._generation.job.stop, eos
            )
            if finish is not None:
                self._generation.finish(index, finish)

    def _fields(self) -> dict[str, object]:
        job = self._generation.job
        return {"request_id": job.request_id, "attempt": self._attempt}


def natural_end(
    token_ids: Sequence[int], stop: StopRules, eos_token_ids: frozenset[int]
) -> Finish | None:
    """How a choice with these tokens has ended by the scheduler's rules; None if it has not."""
    if not token_ids:
        return None
    last, count = token_ids[-1], len(token_ids)
    ends = set(stop.stop_token_ids)
    if not stop.ignore_eos:
        ends |= eos_token_ids
    if count >= max(1, stop.min_tokens) and last in ends:
        return Finish(FinishReason.STOP, stop_token_id=last)
    if stop.max_tokens is not None and count >= stop.max_tokens:
        return Finish(FinishReason.LENGTH)
    return None
