"""One attempt of a generation at one replica: what it delivers, how it ends, whether it moves on.

A replica that drains, or has lost its device, offers its requests to others. The offer is taken
when another replica can go on at once; until then the request stays where it is.
"""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.crashes import SUSPECT, Crashes
from gateway.fleet import Fleet
from gateway.generation import Generation
from gateway.prompt_blocks import PromptBlocks
from gateway.replica.client import Attempt, ReplicaClient
from gateway.replica.translate import Attached
from gateway.replica.view import MoveReason, ReplicaState
from gateway.tokens import Finish, FinishReason, Start, TokenLogprobs
from infermesh.errors import Cancelled, MeshError, ProtocolViolation, ReplicaUnavailable

# A request that may have broken the device waits this long for it before it tries another.
_SUSPECT_PATIENCE_S = 10.0


class Broken(Exception):
    """An attempt ended without its choices having finished; what was delivered stands."""

    def __init__(self, cause: MeshError) -> None:
        super().__init__(cause.message)
        self.cause = cause


class MovedOn(Exception):
    """An attempt is given up because another replica can go on with it at once."""

    def __init__(self, reason: MoveReason, target: ReplicaClient) -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.target = target


class Offer:
    """What a replica said of a request that had better leave it."""

    def __init__(self, reason: MoveReason, made_at: float) -> None:
        self.reason = reason
        self.made_at = made_at
        self._seen_down = False

    def is_void(self, state: ReplicaState) -> bool:
        """The device is back. The replica's reports may come later than its offer."""
        if self.reason is not MoveReason.DEVICE_LOST:
            return False
        self._seen_down |= state is not ReplicaState.SERVING
        return self._seen_down and state is ReplicaState.SERVING


class Journey:
    """One generation on its way from replica to replica: what all its attempts share."""

    def __init__(self, generation: Generation, fleet: Fleet, clock: Callable[[], float]) -> None:
        self.generation = generation
        self.fleet = fleet
        self.clock = clock
        self.prompt = PromptBlocks(generation.job)
        self.crashes = Crashes(len(generation.choices))


class AttemptSink:
    """Hands one attempt's events to the generation and notes how the attempt ended.

    Implements `gateway.replica.session.Sink`.
    """

    def __init__(self, journey: Journey, replica: ReplicaClient) -> None:
        self.journey = journey
        self._generation = journey.generation
        self._replica = replica
        self._crashes = journey.crashes
        self._offer: Offer | None = None
        self._has_delivered = False
        self.was_accepted = False
        self._outcome: asyncio.Future[MeshError | Broken | MovedOn | None] = (
            asyncio.get_running_loop().create_future()
        )

    async def ended(self) -> None:
        """Returns when every choice has finished or was dropped.

        Raises:
            Broken: the attempt was lost.
            MovedOn: it goes on elsewhere.
            MeshError: the replica refused the request, failed it, or gave it up.
        """
        try:
            outcome = await self._outcome
        finally:
            self.decline_offer()
        if outcome is not None:
            raise outcome

    def on_attached(self, attached: Attached) -> None:
        """Another gateway has submitted the same: this is its request, with its seed."""
        job = self._generation.job
        if not self._generation.num_tokens:
            self._generation.job = dataclasses.replace(
                job, sampling=attached.sampling, stop=attached.stop
            )

    def on_taken_over(self) -> None:
        if self._outcome.done():
            return
        self._generation.elsewhere = True
        self._end(Cancelled("the request was taken over by another connection with its key"))

    def on_accepted(self) -> None:
        self.was_accepted = True
        self._generation.accept(self._replica.replica_id)

    def on_refused(self, error: MeshError) -> None:
        self._replica.admittance.refused(error)
        self._end(error)

    def on_started(self, choice: int, start: Start) -> None:
        if not self._outcome.done():
            self._generation.start(choice, start)

    def on_device_time(self, choice: int, device_us: int) -> None:
        self._generation.spend(choice, device_us)

    def on_delta(
        self, choice: int, start: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> None:
        if self._outcome.done() or self._generation.was_dropped(choice):
            return
        try:
            self._generation.extend(choice, start, token_ids, logprobs)
        except ProtocolViolation as violation:
            self._end(Broken(violation))
            return
        self._crashes.got_token(choice)
        if self._offer is not None and self._offer.reason is MoveReason.DEVICE_LOST:
            self.decline_offer()  # the device is back
        if not self._has_delivered:
            self._has_delivered = True
            self._replica.admittance.succeeded()

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

    def on_moved(self, reason: MoveReason, num_crashes: int) -> None:
        if self._outcome.done():
            return
        self._crashes.told(self._generation.open_choices(), num_crashes)
        self._offer = Offer(reason, self.journey.clock())
        self.journey.fleet.listeners.add(self._consider)
        self._consider()

    def on_broken(self, error: MeshError) -> None:
        self._end(Broken(error))

    def on_dropped(self) -> None:
        """A choice is not wanted any more, maybe the last open one."""
        if self._generation.ended:
            self._end(None)

    def _consider(self) -> None:
        """Takes the offer where another replica can go on at once."""
        offer = self._offer
        if offer is None or offer.is_void(self._replica.view.state):
            self.decline_offer()
            return
        if self._outcome.done() or self._is_needed_here(offer):
            return
        fingerprint = self._generation.job.fingerprint
        target = self.journey.fleet.pick_other(fingerprint, self._replica, self.journey.prompt)
        if target is not None:
            self._end(MovedOn(offer.reason, target))

    def _is_needed_here(self, offer: Offer) -> bool:
        """It may have broken this device, and shall not break another while this one comes back."""
        is_suspect = self._crashes.worst(self._generation.open_choices()) >= SUSPECT
        waited_s = self.journey.clock() - offer.made_at
        return (
            is_suspect and offer.reason is MoveReason.DEVICE_LOST and waited_s < _SUSPECT_PATIENCE_S
        )

    def decline_offer(self) -> None:
        self._offer = None
        self.journey.fleet.listeners.discard(self._consider)

    def _end(self, outcome: MeshError | Broken | MovedOn | None) -> None:
        if not self._outcome.done():
            self._outcome.set_result(outcome)


@dataclass(frozen=True, slots=True)
class Adopted:
    """An attempt that is under way when its generation comes to this gateway."""

    replica: ReplicaClient
    attempt: Attempt
    sink: AttemptSink

    def let_go(self, elsewhere: bool) -> None:
        """Harmless where its driver has; one that was cancelled before its first step has not."""
        if elsewhere:
            self.attempt.release()
        self.attempt.cancel()
        self.sink.decline_offer()
