"""The open requests: from a submission to one `finished` per choice; their deadlines and sinks.

Knows nothing of blocks, steps or the waiting queue; `intake.py` says what may come in.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Iterator
from collections.abc import Sequence as Seq

from infermesh.block_hash import scope_hash
from services.scheduler.intake import ModelFacts, Submission
from services.scheduler.sequence import (
    Ending,
    Request,
    Sequence,
    Sink,
    StopRule,
    Timeline,
)
from services.scheduler.stats import Stats


class RequestBook:
    """All requests that are not over, and who has to hear of what happened to them."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._open: dict[Request, None] = {}
        self._deadlines: list[tuple[float, int, Request]] = []
        self._touched: dict[Sink, None] = {}
        self._num_arrived = 0

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._open))

    def open(self, submission: Submission, model: ModelFacts, sink: Sink, now_s: float) -> Request:
        """Makes the request and its sequences; the submission has been checked."""
        prompt = submission.prompt_token_ids
        request = self._request(submission, model, sink, now_s)
        for index, output in submission.choices:
            request.sequences.append(
                Sequence(
                    request=request,
                    choice=index,
                    token_ids=prompt + output,
                    prompt_len=len(prompt),
                    priority=request.priority,
                    order=(request.arrival, index),
                    max_len=request.stop.max_len,
                    timeline=Timeline(arrived_s=now_s),
                    num_crashes=submission.num_crashes,
                )
            )
        self._open[request] = None
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s, request.arrival, request))
        self._stats.accepted(len(prompt))
        return request

    def touch(self, sink: Sink) -> None:
        """It has something to send at the next flush."""
        self._touched[sink] = None

    def flush(self) -> None:
        """One message per sink for all that happened since the last flush."""
        touched, self._touched = self._touched, {}
        for sink in touched:
            sink.flush()

    def emit(self, sequence: Sequence, tokens: Seq[int], logprobs: Seq[object]) -> bool:
        """Hands over the last tokens of a sequence; False where the reader is too slow."""
        request = sequence.request
        sink = request.sink
        self._touched[sink] = None
        if logprobs and request.resumable is not None:
            # copies: a part of a message would hold its whole step
            sequence.logprobs.extend(map(copy.deepcopy, logprobs))
        start = len(sequence.token_ids) - sequence.prompt_len - len(tokens)
        return sink.delta(sequence, start, tokens, logprobs)

    def end(self, sequence: Sequence, ending: Ending, now_s: float) -> None:
        """Marks a sequence as over and says so to its sink."""
        request = sequence.request
        sequence.is_over, sequence.ending = True, ending
        self.touch(request.sink)
        request.sink.finished(sequence, ending)
        self._stats.ended(sequence, ending, now_s)
        if request.is_over:
            self._open.pop(request, None)
            self._let_go()

    def next_deadline_s(self) -> float | None:
        """When `overdue` has to be asked next."""
        while self._deadlines and self._deadlines[0][2].is_over:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def overdue(self, now_s: float) -> list[Request]:
        """Open requests whose deadline has passed, each returned once."""
        late: list[Request] = []
        while (deadline_s := self.next_deadline_s()) is not None and deadline_s <= now_s:
            late.append(heapq.heappop(self._deadlines)[2])
        return late

    def _let_go(self) -> None:
        """Takes finished requests out of the heap once they outnumber the open ones.

        Each holds all its tokens, and an early deadline that is still open would keep those behind
        it. A pass is as long as the number of endings since the last one, so it costs O(1) each.
        """
        if len(self._deadlines) > 2 * len(self._open):
            self._deadlines = [entry for entry in self._deadlines if not entry[2].is_over]
            heapq.heapify(self._deadlines)

    def _request(
        self, submission: Submission, model: ModelFacts, sink: Sink, now_s: float
    ) -> Request:
        self._num_arrived += 1
        eos = frozenset() if submission.ignore_eos else model.eos_token_ids
        prompt_len, max_len = len(submission.prompt_token_ids), model.max_model_len
        if submission.max_tokens is not None:
            max_len = min(max_len, prompt_len + submission.max_tokens)
        remaining_s = submission.remaining_s
        return Request(
            request_id=submission.request_id,
            stream_id=submission.stream_id,
            sink=sink,
            prompt_len=prompt_len,
            sampling=submission.sampling,
            stop=StopRule(eos | submission.stop_token_ids, submission.min_tokens, max_len),
            priority=submission.priority,
            tenant=submission.tenant,
            tenant_weight=submission.tenant_weight,
            scope=scope_hash(submission.sharing_domain),
            arrival=self._num_arrived,
            deadline_s=None if remaining_s is None else now_s + remaining_s,
            traceparent=submission.traceparent,
            resumable=submission.resumable,
        )
