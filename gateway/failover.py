"""Drives one generation to its end over as many attempts as it takes.

When a replica is lost, or hands a request on, the tokens delivered so far are resubmitted with the
prompt, so that nothing is lost and nothing comes twice. Only what was promised (accepted once)
waits for a replica.
"""

from collections.abc import Sequence

from gateway import metrics
from gateway.attempt import Adopted, AttemptSink, Broken, Journey, MovedOn
from gateway.crashes import CONVICTED
from gateway.replica.client import SILENT, Attempt, ReplicaClient
from gateway.replica.translate import Submission
from gateway.request import StopRules
from gateway.tokens import Finish, FinishReason
from infermesh.errors import (
    MeshError,
    Poisoned,
    QueueFull,
    ReplicaUnavailable,
    Unavailable,
    as_mesh_error,
)
from infermesh.telemetry import logs

_log = logs.get(__name__)
# Of a request that was promised to nobody yet.
MAX_BREAKS = 3
_RETRY_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.0
# Another replica may take what one refuses or gives up for these reasons. They are no crash: a
# rolling restart may give up a long stream any number of times.
_ELSEWHERE = (Unavailable, QueueFull)


class Driver:
    """Runs one generation."""

    def __init__(self, journey: Journey) -> None:
        self._journey = journey
        self._generation = journey.generation
        self._fleet = journey.fleet
        self._prompt = journey.prompt
        self._attempt = 0
        self._breaks = 0
        self._crashes = journey.crashes
        # Why another attempt is made, as the metric names it.
        self._why = ""
        self._target: ReplicaClient | None = None
        self._refusing: dict[ReplicaClient, MeshError] = {}
        self._pause_s = _RETRY_PAUSE_S

    async def run(self, adopted: Adopted | None = None) -> None:
        """Ends with the generation finished or failed; raises only when cancelled.

        Args:
            adopted: an attempt that is under way.
        """
        try:
            if adopted is not None:
                await self._follow(adopted.replica, adopted.attempt, adopted.sink)
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
            remaining_s=None if job.deadline is None else job.deadline - self._journey.clock(),
            num_crashes=self._crashes.worst(generation.open_choices()),
        )
        if self._why:
            metrics.FAILOVERS.labels(self._why).inc()
        self._attempt += 1
        sink = AttemptSink(self._journey, replica)
        await self._follow(replica, replica.submit(submission, sink), sink)

    async def _follow(self, replica: ReplicaClient, attempt: Attempt, sink: AttemptSink) -> None:
        generation = self._generation

        def drop(choice: int) -> None:
            attempt.cancel_choice(choice)
            sink.on_dropped()

        generation.on_dropped = drop
        for index, choice in enumerate(generation.choices):
            if choice.dropped:  # of an adopted one: its reader was faster than this task
                drop(index)
        try:
            await sink.ended()
            # a dropped one may run yet: `cancel` below, unless it is to be kept
            if generation.job.resumable or not any(c.dropped for c in generation.choices):
                attempt.release()
        except Broken as broken:
            self._on_break(replica, broken.cause, sink.was_accepted)
        except MovedOn as moved:
            self._why, self._target = f"moved_{moved.reason.value}", moved.target
            self._end_what_is_complete()
        except _ELSEWHERE as refusal:
            self._refusing[replica] = refusal
            self._why = refusal.code
            self._end_what_is_complete()
        finally:
            if generation.elsewhere:
                attempt.release()
            attempt.cancel()

    async def _next_replica(self) -> ReplicaClient:
        """Where to try next; for a generation that was accepted before, waits for a replica.

        Raises:
            MeshError: nothing can take the job, and nothing was promised; or nothing ever will.
        """
        fingerprint = self._generation.job.fingerprint
        target, self._target = self._target, None
        if target is not None and target.routable:  # it was chosen, and counted, already
            return target
        while True:
            await self._fleet.prepare(fingerprint, self._prompt)
            accepted = self._generation.accepted
            replica = self._fleet.pick(fingerprint, self._refusing, self._prompt, accepted)
            if replica is not None:
                return replica
            if not self._generation.accepted:
                raise next(iter(self._refusing.values()), self._fleet.why_none(fingerprint))
            if not self._fleet.may_return(fingerprint):
                raise self._fleet.why_gone(fingerprint)
            await self._fleet.changed(self._pause_s)
            self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
            self._refusing.clear()

    def _on_break(self, replica: ReplicaClient, cause: MeshError, was_accepted: bool) -> None:
        self._breaks += 1
        self._why = cause.code
        generation = self._generation
        if was_accepted and SILENT not in cause.metadata:  # it may just be slow, and go on
            self._crashes.crashed(generation.open_choices())
        _log.warning(
            "attempt lost", extra={**self._fields(), "replica": replica.address, "why": cause.code}
        )
        self._end_what_is_complete()
        num_crashes = self._crashes.worst(generation.open_choices())
        if num_crashes >= CONVICTED:
            raise Poisoned(f"the request was in flight at {num_crashes} losses of its replica")
        if not generation.accepted and self._breaks >= MAX_BREAKS:
            raise ReplicaUnavailable(
                f"the replica was lost {self._breaks} times before it answered"
            )

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
