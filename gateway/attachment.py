"""Finding a request that another gateway began: every replica of the model is asked by its key.

The one that has it sends its output from the first token on, to a generation made of what it says
of the request: prompt, sampling with the drawn seed, stop conditions.
"""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence

from gateway.attempt import AttemptSink, Journey
from gateway.fleet import Fleet
from gateway.generation import Generation
from gateway.replica.client import Attempt, ReplicaClient
from gateway.replica.translate import Attached
from gateway.replica.view import MoveReason
from gateway.request import Job, Resumable
from gateway.tokens import Finish, FinishReason, Start, TokenLogprobs
from infermesh.errors import IdempotencyConflict, MeshError

# A replica on this network answers within a millisecond; one that does not has nothing to say.
TIMEOUT_S = 0.5


class Adoption:
    """One replica's answer to an attach, and a sink for what follows.

    Args:
        job: of the request as it came to this gateway; its prompt is not known yet.
    """

    def __init__(
        self, job: Job, replica: ReplicaClient, fleet: Fleet, clock: Callable[[], float]
    ) -> None:
        self._job = job
        self._fleet = fleet
        self._clock = clock
        self._sink: AttemptSink | None = None
        self.replica = replica
        self.answered: asyncio.Future[MeshError | Attached] = (
            asyncio.get_running_loop().create_future()
        )
        self.generation: Generation | None = None
        self.attempt: Attempt

    @property
    def attached(self) -> Attached | None:
        """What the replica has; None where it has nothing, or not all of it."""
        if not self.answered.done():
            return None
        answer = self.answered.result()
        if isinstance(answer, MeshError) or len(answer.choices) != self._job.num_choices:
            return None
        return answer

    @property
    def sink(self) -> AttemptSink:
        """What the driver waits for."""
        assert self._sink is not None
        return self._sink

    def on_attached(self, attached: Attached) -> None:
        self.generation = Generation(adopted(self._job, attached), self._clock)
        journey = Journey(self.generation, self._fleet, self._clock)
        self._sink = AttemptSink(journey, self.replica)
        self.answered.set_result(attached)

    def on_accepted(self) -> None:
        self.sink.on_accepted()

    def on_refused(self, error: MeshError) -> None:
        self._fail(error)

    def on_started(self, choice: int, start: Start) -> None:
        self.sink.on_started(choice, start)

    def on_device_time(self, choice: int, device_us: int) -> None:
        self.sink.on_device_time(choice, device_us)

    def on_delta(
        self, choice: int, start: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> None:
        self.sink.on_delta(choice, start, token_ids, logprobs)

    def on_finished(self, choice: int, end: Finish | MeshError) -> None:
        if isinstance(end, Finish) and end.reason is FinishReason.CANCELLED:
            # its gateway found a stop string in what is there
            end = dataclasses.replace(end, reason=FinishReason.STOP)
        self.sink.on_finished(choice, end)

    def on_moved(self, reason: MoveReason, num_crashes: int) -> None:
        self.sink.on_moved(reason, num_crashes)

    def on_taken_over(self) -> None:
        self.sink.on_taken_over()

    def on_broken(self, error: MeshError) -> None:
        if self._sink is not None:
            self._sink.on_broken(error)
        else:
            self._fail(error)

    def let_go(self) -> None:
        """It is not the one. What was not answered yet may be found late: that runs on there."""
        if not self.answered.done():
            self.attempt.release()
        self.attempt.cancel()
        if self._sink is not None:
            self._sink.decline_offer()

    def _fail(self, error: MeshError) -> None:
        if not self.answered.done():
            self.answered.set_result(error)


def adopted(job: Job, attached: Attached) -> Job:
    """The job as the gateway that began it had resolved it."""
    assert job.resumable is not None
    return dataclasses.replace(
        job,
        request_id=attached.request_id,
        prompt_token_ids=attached.prompt_token_ids,
        sampling=attached.sampling,
        stop=attached.stop,
        resumable=dataclasses.replace(job.resumable, record_id=attached.record_id),
    )


async def find(
    fleet: Fleet,
    name: Resumable,
    job: Job,
    clock: Callable[[], float],
    timeout_s: float = TIMEOUT_S,
) -> Adoption | None:
    """The request as one of the replicas has it; None where none does.

    Raises:
        IdempotencyConflict: a replica has another request of that key.
    """
    replicas = fleet.attachable(job.fingerprint)
    asked = [Adoption(job, replica, fleet, clock) for replica in replicas]
    for one in asked:
        one.attempt = one.replica.attach(name, one)
    found: Adoption | None = None
    try:
        pending = {one.answered for one in asked}
        async with asyncio.timeout(timeout_s):
            while pending and found is None:
                _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                found = next((one for one in asked if one.attached is not None), None)
    except TimeoutError:
        pass
    finally:
        for one in asked:
            if one is not found:
                one.let_go()
    if found is None:
        for one in asked:
            if one.answered.done() and isinstance(one.answered.result(), IdempotencyConflict):
                raise IdempotencyConflict(
                    "the Idempotency-Key was used for another request", param="Idempotency-Key"
                )
    return found
