"""Epochs and the order of steps: which stream may speak, and which step comes next.

Pure rules, owned by the event loop. Slots, queues and sockets are elsewhere.
"""

from __future__ import annotations

from infermesh.errors import MeshError, ProtocolViolation, StaleEpoch
from services.shard.domain import Epoch, Step, StepId

MAX_WINDOW = 64


class EpochState:
    """One opened epoch: accepts its steps in order until it is closed."""

    def __init__(self, epoch: Epoch, window: int) -> None:
        self.epoch = epoch
        self.window = window
        self.closed_by: MeshError | None = None
        self.closed = False
        self._next_step_id = StepId(1)
        self._next_result_id = StepId(1)

    @property
    def num_in_flight(self) -> int:
        """Steps accepted and not answered."""
        return self._next_step_id - self._next_result_id

    def accept(self, step: Step) -> None:
        """Takes the next step.

        Raises:
            MeshError: the epoch is over; whatever ended it.
            ProtocolViolation: another epoch, a gap in the step ids, or more steps than the window.
        """
        if self.closed:
            raise self.closed_by or StaleEpoch(
                f"epoch {self.epoch} is over", metadata={"epoch": str(self.epoch)}
            )
        if step.epoch != self.epoch:
            raise ProtocolViolation(
                f"the step is of epoch {step.epoch}, the stream of epoch {self.epoch}"
            )
        if step.step_id != self._next_step_id:
            raise ProtocolViolation(
                f"step_id is {step.step_id}, expected {self._next_step_id}: "
                "step ids are contiguous from 1 in each epoch"
            )
        if self.num_in_flight >= self.window:
            raise ProtocolViolation(
                f"step {step.step_id} exceeds the window of {self.window} steps in flight"
            )
        self._next_step_id = StepId(step.step_id + 1)

    def answer(self, step_id: StepId) -> None:
        """Marks a step as answered, which makes room in the window."""
        if step_id != self._next_result_id:
            raise AssertionError(f"step {step_id} answered before step {self._next_result_id}")
        self._next_result_id = StepId(step_id + 1)

    def close(self, error: MeshError | None = None) -> None:
        """Ends the epoch; the first reason stays."""
        if not self.closed:
            self.closed = True
            self.closed_by = error


class EpochGate:
    """Admits streams by their epoch: each must be higher than all before, and ends the last."""

    def __init__(self) -> None:
        self.epoch = Epoch(0)
        self.current: EpochState | None = None

    def open(self, epoch: Epoch, window: int) -> EpochState:
        """Opens an epoch and closes the one before with StaleEpoch.

        Raises:
            StaleEpoch: the epoch is not higher than the current one, which `metadata` names.
            ProtocolViolation: the window is out of range.
        """
        if not 1 <= window <= MAX_WINDOW:
            raise ProtocolViolation(f"window is {window}, allowed are 1 to {MAX_WINDOW}")
        if epoch <= self.epoch:
            raise self._stale(f"epoch {epoch} is not above the current epoch {self.epoch}")
        self.epoch = epoch
        if self.current is not None:
            self.current.close(self._stale(f"epoch {epoch} was opened"))
        self.current = EpochState(epoch, window)
        return self.current

    def _stale(self, message: str) -> StaleEpoch:
        return StaleEpoch(message, metadata={"epoch": str(self.epoch)})
