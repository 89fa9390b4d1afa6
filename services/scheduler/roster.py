"""Everybody on this replica: each open sequence waits in the queue or runs in the ledger.

Owns the moves between the two and out. When to move is decided by the plan, by results and by
clients; `batcher.py` connects them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from infermesh.errors import MeshError
from infermesh.telemetry import logs
from services.scheduler.intake import ModelFacts, Submission
from services.scheduler.ledger import Capacity, Ledger
from services.scheduler.pace import Pace
from services.scheduler.queue import WaitingQueue
from services.scheduler.requests import RequestBook
from services.scheduler.sequence import Ending, FinishReason, Request, Sequence, Sink
from services.scheduler.stats import Stats
from services.scheduler.suspects import Suspects

_log = logs.get(__name__)


class Roster:
    """Requests, the queue and the ledger, kept consistent."""

    def __init__(
        self,
        model: ModelFacts,
        ledger: Ledger,
        queue: WaitingQueue,
        suspects: Suspects,
        stats: Stats,
        clock: Callable[[], float],
    ) -> None:
        self.model = model
        self.ledger = ledger
        self.queue = queue
        self.suspects = suspects
        self.stats = stats
        self.clock = clock
        self.requests = RequestBook(stats)
        self.pace = Pace()

    def admit(self, submission: Submission, sink: Sink) -> Request:
        """Opens a checked submission: its sequences wait, or are over at once."""
        request = self.requests.open(submission, self.model, sink, self.clock())
        sink.accepted(request.stream_id, self.queue.num_tokens)
        self.requests.touch(sink)
        first = request.sequences[0]
        self.ledger.hash_blocks(first)
        full = first.prompt_len // self.ledger.capacity.block_size
        for sequence in request.sequences:
            if self._is_done(sequence):
                continue
            if sequence is not first:  # the prompt is hashed once
                if not first.is_long:
                    sequence.block_hashes = first.block_hashes[:full]
                self.ledger.hash_blocks(sequence)
            shared = 0 if sequence is first else sequence.prompt_len - 1
            self.queue.push(sequence, len(sequence.token_ids) - shared)
            if self.suspects.consider(sequence):
                self.make_way()
        return request

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence that came to its own end."""
        self.pace.answered(sequence.num_output)
        last = sequence.token_ids[-1] if reason is FinishReason.STOP else None
        self.end(sequence, Ending(reason, stop_token_id=last))

    def end(self, sequence: Sequence, ending: Ending) -> None:
        """Takes a sequence from where it is and closes it."""
        self._take_out(sequence)
        self.queue.close(sequence)
        self.requests.end(sequence, ending, self.clock())

    def fail(self, request: Request, error: MeshError) -> None:
        """Ends every open choice of a request with one error."""
        if request.is_over:
            return
        # The code alone: a message may name token ids.
        _log.info(
            "request failed",
            extra={
                "request_id": request.request_id,
                "traceparent": request.traceparent,
                "error": error.code,
            },
        )
        for sequence in request.sequences:
            if not sequence.is_over:
                self.end(sequence, Ending(FinishReason.ERROR, error))

    def cancel(self, request: Request, choices: Collection[int]) -> None:
        """Ends these open choices of a request, all where none is named."""
        for sequence in request.sequences:
            if not sequence.is_over and (not choices or sequence.choice in choices):
                self.end(sequence, Ending(FinishReason.CANCELLED))

    def preempt(self, sequence: Sequence) -> None:
        """Back to the queue; tokens in flight are still taken."""
        self._take_out(sequence)
        self.requeue(sequence)
        sequence.timeline.num_preemptions += 1
        self.stats.preempted()

    def make_way(self) -> None:
        """A suspect needs the device for itself."""
        for sequence in list(self.ledger.running):
            self.preempt(sequence)

    def requeue(self, sequence: Sequence) -> None:
        """It lost its place and waits for another, at the place of its arrival."""
        self.ledger.hash_blocks(sequence)
        self.queue.push(sequence, len(sequence.token_ids))

    def restart(self, lost: list[Sequence]) -> None:
        """What they had in flight is void: they wait again."""
        for sequence in lost:
            sequence.timeline.num_replays += 1
            if not sequence.is_over:
                self.requeue(sequence)

    def reset_device(self, capacity: Capacity, caching: bool, eviction_classes: int) -> None:
        """Another device, or one that lost its memory: nobody runs, nothing is cached."""
        old_size = self.ledger.capacity.block_size
        rope_switch_len = self.model.rope_switch_len
        self.ledger = Ledger(capacity, caching, rope_switch_len, eviction_classes)
        for request in self.requests:
            for sequence in request.sequences:
                sequence.waits_for = None
                if capacity.block_size != old_size:
                    sequence.block_hashes.clear()
                    self.ledger.hash_blocks(sequence)

    def num_tokens_waiting(self) -> int:
        """Prompt tokens not computed yet, waiting and running."""
        running = 0
        for sequence in self.ledger.running:
            place = sequence.placement
            if place is not None and not place.has_sampled:
                running += len(sequence.token_ids) - place.num_computed
        return self.queue.num_tokens + running

    def check_integrity(self) -> None:
        """Raises AssertionError unless each open sequence is in exactly one place."""
        self.ledger.check_integrity()
        open_sequences = [s for request in self.requests for s in request.sequences]
        for sequence in open_sequences:
            runs, waits = sequence.placement is not None, sequence in self.queue
            assert runs + waits == (not sequence.is_over), "a sequence is lost, or in two places"
        assert len(self.queue) + len(self.ledger.running) == sum(
            not sequence.is_over for sequence in open_sequences
        ), "a closed sequence waits or runs"
        assert len(self.queue) or self.queue.num_tokens == 0, "an empty queue counts tokens"

    def _take_out(self, sequence: Sequence) -> None:
        if sequence.placement is not None:
            self.ledger.retire(sequence.placement)
        elif sequence in self.queue:
            self.queue.remove(sequence)

    def _is_done(self, sequence: Sequence) -> bool:
        """A resumed output may satisfy a stop condition already, or max_tokens be 0."""
        verdict = sequence.request.stop.verdict(sequence.token_ids, sequence.prompt_len)
        if verdict is None:
            return False
        self.finish(sequence, verdict)
        return True
