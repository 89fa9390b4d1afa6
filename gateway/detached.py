"""Requests whose clients have gone and may come back: read on in their place, for the grace."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from gateway import metrics
from gateway.reply import Reply
from infermesh.errors import MeshError, SlowConsumer
from infermesh.telemetry import logs

_log = logs.get(__name__)


def goes_on(reply: Reply, error: BaseException | None) -> bool:
    """Its client is gone, and the request was asked to outlive that."""
    is_gone = isinstance(error, (asyncio.CancelledError, GeneratorExit, SlowConsumer))
    return is_gone and reply.is_kept and not reply.is_elsewhere


class Detached:
    """Replies without clients.

    Args:
        spawn: runs a coroutine in the background, as `TaskGroup.create_task` does.
        end: accounts for a reply that has ended, and closes it.
    """

    def __init__(
        self,
        grace_s: float,
        spawn: Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"],
        end: Callable[[Reply, BaseException | None], None],
    ) -> None:
        self._grace_s = grace_s
        self._spawn = spawn
        self._end = end
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, reply: Reply) -> None:
        """Reads the reply to its end, or to the end of the grace."""
        failures: list[BaseException] = []
        task = self._spawn(self._read(reply, failures))
        self._tasks.add(task)

        def ended(task: "asyncio.Task[None]") -> None:
            # not in the task, which may be cancelled before its first step
            self._tasks.discard(task)
            metrics.DETACHED.set(len(self._tasks))
            failure = asyncio.CancelledError() if task.cancelled() else next(iter(failures), None)
            self._end(reply, failure)

        task.add_done_callback(ended)
        metrics.DETACHED.set(len(self._tasks))

    def hand_over(self) -> None:
        """Ends all of them now."""
        for task in list(self._tasks):
            task.cancel()

    async def _read(self, reply: Reply, failures: list[BaseException]) -> None:
        try:
            async with asyncio.timeout(self._grace_s):
                async for _ in reply.batches():
                    pass
        except TimeoutError:
            failures.append(asyncio.CancelledError())
        except MeshError as error:
            failures.append(error)
        except Exception as exc:
            _log.exception("a request without a client failed")
            failures.append(exc)
