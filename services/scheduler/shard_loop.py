"""Keeps a replica connected to its shard for ever: describe, load, open an epoch, run steps.

Whatever breaks, the requests stay and a new epoch is opened. With the shard's incarnation unchanged
the blocks of executed steps are still there; else everything is computed again.
"""

from __future__ import annotations

import asyncio
import logging
import time

from infermesh.errors import (
    Draining,
    InvalidRequest,
    MeshError,
    ModelLoadFailed,
    OutOfMemory,
    ReplicaUnavailable,
    StaleEpoch,
    UnsupportedModel,
    as_mesh_error,
)
from infermesh.stall import Patience, Silence
from infermesh.telemetry import logs
from services.scheduler.batcher import Batcher
from services.scheduler.ledger import AppliedStep
from services.scheduler.replica import Replica, State
from services.scheduler.shard_link import Description, ShardLink, StepStream
from services.scheduler.steps import encode

_MIN_PAUSE_S, _MAX_PAUSE_S = 0.05, 1.0
_LOOK_S = 0.25
# The shard will not load it, however often it is asked; a corrected one may take its place.
_HOPELESS = (UnsupportedModel, ModelLoadFailed, OutOfMemory, InvalidRequest)
# Marks a break that was made here, because the shard was silent.
_STALLED = "stalled"
_log = logs.get(__name__)


class ShardLoop:
    """Drives one replica over one shard."""

    def __init__(self, replica: Replica, link: ShardLink) -> None:
        self._replica = replica
        self._link = link
        self._epoch = 0
        # Of the device memory that the batcher's books describe.
        self._incarnation: int | None = None
        # What a process can't serve, and which process; until another one has loaded.
        self._failure: MeshError | None = None
        self._failed_incarnation: int | None = None
        self._pause_s = _MIN_PAUSE_S
        self._patience = Patience(replica.config.stall_s, replica.config.stall_unknown_s)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self._serve()
            except* MeshError as group:
                error = as_mesh_error(group)
                self._broken(error, await self._is_crash(error))
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(_MAX_PAUSE_S, 2 * self._pause_s)

    async def _serve(self) -> None:
        description = await self._link.describe()
        await self._load(description)
        model, batcher = self._replica.model, self._replica.batcher
        assert model is not None
        assert batcher is not None
        self._epoch = max(self._epoch, description.epoch) + 1
        async with self._link.open(self._epoch, batcher.settings.max_window) as stream:
            if stream.incarnation != model.incarnation:
                raise ReplicaUnavailable("the shard restarted meanwhile")
            batcher.open_epoch(stream.capacity, stream.incarnation == self._incarnation)
            if stream.incarnation != self._incarnation:
                self._patience.reset()
            self._incarnation = stream.incarnation
            self._replica.move_to(State.SERVING)
            _log.info("epoch opened", extra={"epoch": self._epoch})
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._take_results(stream, batcher))
                tasks.create_task(self._send_steps(stream, batcher))
                tasks.create_task(self._watch_steps(batcher))

    async def _load(self, description: Description) -> None:
        replica = self._replica
        model = replica.model
        if (
            model is not None
            and description.is_loaded
            and description.incarnation == model.incarnation
        ):
            return
        if self._failure is not None and description.incarnation == self._failed_incarnation:
            raise self._failure.with_traceback(None)  # the same process would fail again
        try:
            replica.adopt(await self._link.load(self._on_progress))
            self._failure = None
        except _HOPELESS as error:
            self._failed_incarnation, self._failure = description.incarnation, error
            replica.move_to(State.FAILED, error)
            replica.fail_all(ReplicaUnavailable(error.message))
            raise

    def _on_progress(self, stage: str, progress: float) -> None:
        replica = self._replica
        replica.load_stage, replica.load_progress = stage, progress
        if replica.state is State.FAILED:
            replica.move_to(State.LOADING)
        replica.changed.notify()

    async def _take_results(self, stream: StepStream, batcher: Batcher) -> None:
        async for result in stream.results():
            num_tokens = batcher.in_flight[0].num_tokens if batcher.in_flight else 0
            batcher.commit(result)
            self._patience.took(num_tokens, result.timings.execute_us / 1e6)
            self._pause_s = _MIN_PAUSE_S
            self._replica.stepped()

    async def _send_steps(self, stream: StepStream, batcher: Batcher) -> None:
        work, max_wait_s = self._replica.work, self._replica.config.max_wait_ms / 1000
        while True:
            work.clear()
            step = batcher.next_step()
            if step is not None:
                if not await stream.send(encode(stream.epoch, step, stream.packs_rows)):
                    return
                continue
            was_idle = batcher.is_idle
            await work.wait()
            if was_idle and max_wait_s > 0:  # company makes the first step cheaper
                await asyncio.sleep(max_wait_s)

    async def _watch_steps(self, batcher: Batcher) -> None:
        """Raises ReplicaUnavailable where the shard is silent for longer than any step takes."""
        silence = Silence(time.monotonic, 2 * _LOOK_S)
        oldest: AppliedStep | None = None
        while True:
            await asyncio.sleep(_LOOK_S)
            before, oldest = oldest, batcher.in_flight[0] if batcher.in_flight else None
            if oldest is None or oldest is not before:
                silence.heard()
                continue
            silent_s, patience_s = silence.look(), self._patience.limit_s(oldest.num_tokens)
            if silent_s > patience_s:
                self._replica.stats.stalled()
                why = f"the shard has answered no step for {silent_s:.1f} s"
                raise ReplicaUnavailable(why, metadata={_STALLED: "1"})

    async def _is_crash(self, error: MeshError) -> bool:
        """Whether a step may be to blame: not where the connection was lost and the shard lives."""
        if isinstance(error, (StaleEpoch, Draining)):
            return False
        batcher = self._replica.batcher
        if batcher is None or not batcher.in_flight:
            return True  # nobody is blamed
        if not isinstance(error, ReplicaUnavailable) or _STALLED in error.metadata:
            return True
        try:
            description = await self._link.describe(patient=False)
        except MeshError:
            return True
        return description.incarnation != self._incarnation

    def _broken(self, error: MeshError, is_crash: bool) -> None:
        replica = self._replica
        if isinstance(error, StaleEpoch):
            self._epoch = max(self._epoch, int(error.metadata.get("epoch", "0")))
        if replica.batcher is not None:
            replica.batcher.break_epoch(is_crash)
        has_served = self._incarnation is not None
        if has_served and self._failure is None and not isinstance(error, _HOPELESS):
            replica.move_to(State.RECOVERING, error)
            if is_crash and isinstance(error, ReplicaUnavailable):  # the shard is gone
                replica.device_lost()
        _log.log(
            logging.WARNING if has_served else logging.INFO,  # it may not be up yet
            "the shard is not connected",
            extra={"reason": error.code, "detail": error.message},
        )
