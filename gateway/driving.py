"""The generations of this gateway that are under way, each with the driver that runs it."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from gateway.attempt import Adopted, Journey
from gateway.failover import Driver
from gateway.fleet import Fleet
from gateway.generation import Generation
from infermesh.errors import MeshError


class Driving:
    """Starts drivers and lets go of what has ended.

    Args:
        spawn: runs a coroutine in the background, as `TaskGroup.create_task` does.
        on_ended: called with each generation that has ended, or that nobody wants any more.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        fleet: Fleet,
        spawn: Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"],
        on_ended: Callable[[Generation], None],
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._spawn = spawn
        self._on_ended = on_ended
        self._clock = clock
        self._tasks: dict[Generation, asyncio.Task[None]] = {}
        # What can be resumed is left to its replica by whoever goes, not cancelled there.
        self.leaving = False

    def begin(self, generation: Generation, adopted: Adopted | None = None) -> None:
        """Runs a generation; one whose attempt is under way already is followed."""
        if adopted is None:
            journey = Journey(generation, self._fleet, self._clock)
        else:
            journey = adopted.sink.journey
        task = self._spawn(Driver(journey).run(adopted))
        self._tasks[generation] = task
        task.add_done_callback(lambda _: self._forget(generation))

        def abandon() -> None:
            if self.leaving:
                generation.elsewhere |= generation.job.resumable is not None
            self._forget(generation)
            task.cancel()
            if adopted is not None:
                adopted.let_go(generation.elsewhere)

        generation.on_abandoned = abandon

    def fail_all(self, error: MeshError) -> None:
        """Ends what is left; clients get the error as their last event."""
        for generation, task in list(self._tasks.items()):
            generation.elsewhere |= generation.job.resumable is not None
            generation.fail(error)
            task.cancel()

    def _forget(self, generation: Generation) -> None:
        self._tasks.pop(generation, None)
        self._on_ended(generation)
