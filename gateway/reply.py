"""The answer to one request as its client sees it: text of every choice, usage, waterfall.

Owns the request's readers and its text state. Edges turn its deltas into bytes.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from gateway import metrics
from gateway.alarm import Alarm
from gateway.auth.gate import Ticket
from gateway.cache.translate import Question
from gateway.generation import ChoiceNews, Generation
from gateway.records import RequestRecord
from gateway.request import Options
from gateway.served_model import ServedModel
from gateway.text.choice_text import ChoiceText
from gateway.tokens import ChoiceDelta, ChoiceTimings, Usage
from infermesh.errors import DeadlineExceeded, MeshError


class Reader(Protocol):
    """What a reply reads: a running generation, or a stored answer that is replayed."""

    @property
    def generation(self) -> Generation: ...
    @property
    def admitted(self) -> bool: ...
    def take(self) -> list[ChoiceNews]: ...
    def decline(self, choice: int) -> None: ...
    def close(self) -> None: ...


class PromptReply:
    """The choices of one prompt.

    Args:
        num_had: tokens of each choice that the client has; empty: none.
    """

    def __init__(
        self,
        reader: Reader,
        model: ServedModel,
        options: Options,
        first_index: int,
        num_had: Sequence[int] = (),
    ) -> None:
        self._reader = reader
        self.num_had = had = tuple(num_had) or (0,) * options.n
        job = reader.generation.job
        self.prompt_len = len(job.prompt_token_ids)
        self.texts = [
            ChoiceText(
                first_index + i,
                model.text.family,
                options.stop_strings,
                job.stop.min_tokens,
                had[i],
            )
            for i in range(job.num_choices)
        ]

    @property
    def reader(self) -> Reader:
        return self._reader

    @property
    def done(self) -> bool:
        """Every choice has ended."""
        return all(text.done for text in self.texts)

    def take(self) -> list[ChoiceDelta]:
        """New text of its choices; one that has ended here is declined."""
        deltas: list[ChoiceDelta] = []
        ended_here: list[int] = []
        for news in self._reader.take():
            text = self.texts[news.choice]
            if text.done:
                continue  # a stop string ended it; the replica had not heard of that yet
            text.push(news.token_ids, news.logprobs)
            if news.finish is not None:
                text.finish(news.finish)
            elif text.done:
                ended_here.append(news.choice)
            if (delta := text.take()) is not None:
                deltas.append(delta)
        for choice in ended_here:  # before it leaves: what all have declined has ended well
            self._reader.decline(choice)
        if self.done:
            self._reader.close()
        return deltas

    def usage(self) -> Usage:
        """What was generated for, and shown to, this client."""
        cached = [log.cached_prompt_tokens for log in self._reader.generation.choices]
        return Usage(
            prompt_tokens=self.prompt_len,
            completion_tokens=sum(text.num_tokens for text in self.texts),
            cached_prompt_tokens=min(cached),
        )

    def timings(self) -> ChoiceTimings | None:
        """Of the choice that took longest."""
        known = [t for log in self._reader.generation.choices if (t := log.timings) is not None]
        return max(known, key=lambda t: t.queue_s + t.prefill_s + t.decode_s, default=None)


class Reply:
    """All choices of a request, admitted and under way.

    Args:
        deadline: on `clock`; the request fails with DEADLINE_EXCEEDED then.
        ticket: settled before the last of the answer is handed out: nobody has all of an answer
            that was not accounted for.
        on_close: gives the request's place back.
        question: what the cache was, or would have been, asked.
    """

    def __init__(
        self,
        model: ServedModel,
        prompts: Sequence[PromptReply],
        wake: asyncio.Event,
        record: RequestRecord,
        deadline: float,
        clock: Callable[[], float],
        ticket: Ticket,
        on_close: Callable[[], None],
        question: Question | None = None,
    ) -> None:
        self.model = model
        self.question = question
        self.record = record
        self.ticket = ticket
        self.prompts = prompts
        self._wake = wake
        self._deadline = deadline
        self._clock = clock
        self._on_close = on_close
        self._closed = False
        self._alarm = Alarm(self._ring)
        self._is_silent = False
        record.refresh = self._note_progress

    async def admitted(self) -> None:
        """Returns once every prompt was accepted by a scheduler.

        Raises:
            MeshError: one was refused.
        """
        await self.until(lambda: all(prompt.reader.admitted for prompt in self.prompts))
        self._note_admission()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns once the condition holds, which is looked at whenever anything has changed.

        Raises:
            DeadlineExceeded: it did not within the request's time.
        """
        while not condition():
            await self._woken(None)
            self._note_admission()

    @property
    def is_kept(self) -> bool:
        """Its client may go away, and come back."""
        return any(p.reader.generation.job.resumable is not None for p in self.prompts)

    @property
    def is_elsewhere(self) -> bool:
        """Another gateway goes on with it."""
        return any(prompt.reader.generation.elsewhere for prompt in self.prompts)

    @property
    def ended(self) -> bool:
        """No generation of it goes on."""
        return all(prompt.reader.generation.ended for prompt in self.prompts)

    def has_news(self, whole: bool) -> bool:
        """There is something to show: any token, or where `whole`, the end."""
        has_token = any(prompt.reader.generation.num_tokens for prompt in self.prompts)
        return self.ended or (has_token and not whole)

    def replace(self, prompts: Sequence[PromptReply]) -> None:
        """Goes on with other readers, before anything was taken from the old ones."""
        for prompt in self.prompts:
            prompt.reader.close()
        self.prompts = prompts

    async def batches(self, patience_s: float | None = None) -> AsyncIterator[list[ChoiceDelta]]:
        """New deltas as they come; an empty batch after each `patience_s` of silence.

        Raises:
            MeshError: the request failed; after everything that came before.
        """
        done = self._done()
        while not done:
            batch, failure = self._take()
            if batch:
                done = self._done()
                if done or self.record.first_token_at is None:  # whoever looks between refreshes it
                    self._note_progress()
                if done:
                    self.ticket.settle(self.record)
                yield batch
            if failure is not None:
                raise failure
            if not batch and not await self._woken(patience_s):
                yield []

    def _take(self) -> tuple[list[ChoiceDelta], MeshError | None]:
        """What is new, and why no more will come."""
        batch: list[ChoiceDelta] = []
        for prompt in self.prompts:
            try:
                if not prompt.done:
                    batch.extend(prompt.take())
            except MeshError as error:
                return batch, error
        return batch, None

    def usage(self) -> Usage:
        """What the request cost so far."""
        return sum((prompt.usage() for prompt in self.prompts), Usage())

    @property
    def waterfall(self) -> str:
        """Where the time went, as a Server-Timing value."""
        return self.record.waterfall(self._clock())

    def close(self) -> None:
        """Leaves its generations, which end with their last reader. Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        self._alarm.close()
        for prompt in self.prompts:
            prompt.reader.close()
        self._note_progress()
        self.record.refresh = None  # the record outlives the reply, and its tokens
        self._on_close()

    def _done(self) -> bool:
        return all(prompt.done for prompt in self.prompts)

    async def _woken(self, patience_s: float | None) -> bool:
        """False after `patience_s` without news."""
        remaining = self._deadline - self._clock()
        if remaining <= 0:
            raise DeadlineExceeded("the request's time is over")
        wait_s = remaining if patience_s is None else min(patience_s, remaining)
        self._alarm.set(wait_s)
        await self._wake.wait()
        self._alarm.off()
        self._wake.clear()
        was_silent, self._is_silent = self._is_silent, False
        return not was_silent

    def _ring(self) -> None:
        self._is_silent = True
        self._wake.set()

    def _note_admission(self) -> None:
        accepted = all(prompt.reader.generation.accepted for prompt in self.prompts)
        if accepted and self.record.admitted_at is None:
            self.record.admitted_at = self._clock()

    def _note_progress(self) -> None:
        record = self.record
        record.usage = self.usage()
        if record.first_token_at is None and record.usage.completion_tokens:
            record.first_token_at = self._clock()
            model = metrics.model_label(record.model)
            metrics.TIME_TO_FIRST_TOKEN.labels(record.endpoint, model).observe(
                record.first_token_at - record.started_at
            )
        known = [t for p in self.prompts if (t := p.timings()) is not None]
        if known:
            record.timings = known[-1]
        record.attempts = [
            replica for p in self.prompts for replica in p.reader.generation.replica_ids
        ]
