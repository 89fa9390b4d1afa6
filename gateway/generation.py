"""One generation as it grows, and everyone who reads it.

Owns the tokens of a job. One driver (see `failover`) writes, any number of readers follow at their
own pace from the first token on. Writing never waits for a reader.
"""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gateway import metrics
from gateway.request import Job, ReplicaId
from gateway.tokens import ChoiceTimings, Finish, Start, TokenLogprobs
from infermesh.errors import Cancelled, MeshError, ProtocolViolation, SlowConsumer


@dataclass(slots=True)
class ChoiceLog:
    """All of one choice so far."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    start: Start | None = None
    finish: Finish | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    # No reader wants more of it: it has ended here, whatever its replica still does.
    dropped: bool = False

    @property
    def over(self) -> bool:
        return self.dropped or self.finish is not None

    @property
    def timings(self) -> ChoiceTimings | None:
        """As its replica reported them; of a choice that did not run to its end, up to now."""
        if self.finish is not None:
            return self.finish.timings
        if self.start is None or self.first_token_at is None or self.last_token_at is None:
            return None
        decode_s = self.last_token_at - self.first_token_at
        return dataclasses.replace(self.start.timings, decode_s=decode_s)

    @property
    def cached_prompt_tokens(self) -> int:
        """Prompt tokens whose KV was reused; 0 until its first token."""
        told = self.finish or self.start
        return 0 if told is None else told.cached_prompt_tokens


class ChoiceNews(NamedTuple):
    """What a reader had not seen of one choice."""

    choice: int
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs]
    finish: Finish | None


class Reader:
    """One subscriber: where it is in each choice, and the event that wakes it.

    A reader that falls `max_unread` tokens behind is dropped with SLOW_CONSUMER; what was there
    when it joined does not count.
    """

    def __init__(self, generation: "Generation", wake: asyncio.Event, max_unread: int) -> None:
        self._generation = generation
        self._positions = [0] * len(generation.choices)
        self._finish_seen = [False] * len(generation.choices)
        self._declined: set[int] = set()
        self._num_read = 0
        self._num_at_join = generation.num_tokens
        self._max_unread = max_unread
        self._error: MeshError | None = None
        self.wake = wake

    @property
    def generation(self) -> "Generation":
        return self._generation

    @property
    def admitted(self) -> bool:
        """A scheduler has accepted the job.

        Raises:
            MeshError: it failed before or after.
        """
        self._raise_error()
        return self._generation.accepted

    def take(self) -> list[ChoiceNews]:
        """Everything new, choices with nothing new left out.

        Raises:
            MeshError: the generation failed, or this reader was too slow; only once everything
                before has been taken.
        """
        news = []
        for index, choice in enumerate(self._generation.choices):
            start = self._positions[index]
            token_ids = choice.token_ids[start:]
            ended = choice.finish is not None and not self._finish_seen[index]
            if not token_ids and not ended:
                continue
            self._positions[index] += len(token_ids)
            self._finish_seen[index] = ended
            self._num_read += len(token_ids)
            news.append(ChoiceNews(index, token_ids, choice.logprobs[start:], choice.finish))
        if not news:
            self._raise_error()
        return news

    def decline(self, choice: int) -> None:
        """Wants no more of one choice, which ends once no reader does."""
        self._declined.add(choice)
        self._generation.drop_unwanted()

    def wants(self, choice: int) -> bool:
        """It has not declined the choice."""
        return choice not in self._declined

    def close(self) -> None:
        """Stops reading; the generation ends with its last reader. Harmless when repeated."""
        self._generation.leave(self)

    def on_growth(self) -> bool:
        """Wakes the reader; False where it has fallen too far behind."""
        self.wake.set()
        unread = self._generation.num_tokens - max(self._num_read, self._num_at_join)
        if unread <= self._max_unread:
            return True
        self._error = SlowConsumer(
            f"the client left {unread} tokens unread; at most {self._max_unread} are kept for it"
        )
        return False

    def _raise_error(self) -> None:
        error = self._error or self._generation.error
        if error is not None:
            raise error


class Generation:
    """The log of one job's choices.

    Args:
        clock: monotonic seconds.

    Attributes:
        on_abandoned: called when the last reader left before the end.
        on_dropped: called with a choice that no reader wants any more.
        elsewhere: it goes on without this gateway, which does not account for it.
    """

    def __init__(self, job: Job, clock: Callable[[], float]) -> None:
        self.job = job
        self.choices = [ChoiceLog() for _ in range(job.num_choices)]
        self.num_tokens = 0
        self.accepted = False
        self.elsewhere = False
        self.error: MeshError | None = None
        self.replica_ids: list[ReplicaId] = []  # one per attempt that was accepted
        self.on_abandoned: Callable[[], None] = lambda: None
        self.on_dropped: Callable[[int], None] = lambda choice: None
        self._clock = clock
        self._gaps = metrics.INTER_TOKEN_LATENCY.labels(metrics.model_label(job.model_id))
        self._readers: list[Reader] = []

    @property
    def ended(self) -> bool:
        """Failed, or every choice has finished or was dropped."""
        return self.error is not None or all(choice.over for choice in self.choices)

    @property
    def joinable(self) -> bool:
        """A newcomer can have all of it: it goes on, and no choice was dropped."""
        return not self.ended and not any(choice.dropped for choice in self.choices)

    @property
    def num_readers(self) -> int:
        return len(self._readers)

    def join(self, wake: asyncio.Event, max_unread: int) -> Reader:
        """A new reader, from the first token on."""
        reader = Reader(self, wake, max_unread)
        self._readers.append(reader)
        wake.set()
        return reader

    def leave(self, reader: Reader) -> None:
        """The reader is gone; with the last one, so is the reason to go on."""
        if reader not in self._readers:
            return
        self._readers.remove(reader)
        if not self._readers and not self.ended:
            self.error = Cancelled("nobody reads this generation any more")
            self.on_abandoned()
        elif self._readers:
            self.drop_unwanted()

    def drop_unwanted(self) -> None:
        """Ends the choices that every reader has declined."""
        if self.error is not None:
            return
        for index in self.open_choices():
            if not any(reader.wants(index) for reader in self._readers):
                self.choices[index].dropped = True
                self.on_dropped(index)

    def accept(self, replica_id: ReplicaId) -> None:
        """A scheduler has taken the job, or its resumption."""
        self.accepted = True
        self.replica_ids.append(replica_id)
        self._wake_all()

    def start(self, choice: int, start: Start) -> None:
        """A choice's first token is there; of several attempts, the first counts."""
        if 0 <= choice < len(self.choices) and self.choices[choice].start is None:
            self.choices[choice].start = start

    def extend(
        self,
        choice: int,
        start: int,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
    ) -> None:
        """Appends what a scheduler delivered.

        Raises:
            ProtocolViolation: it does not begin where the last delivery ended.
        """
        if not 0 <= choice < len(self.choices):
            raise ProtocolViolation(f"a delta names choice {choice} of {len(self.choices)}")
        log = self.choices[choice]
        if log.finish is not None or start != len(log.token_ids):
            raise ProtocolViolation(
                f"a delta of choice {choice} starts at token {start}; {len(log.token_ids)} are "
                f"there{' and it has finished' if log.finish else ''}"
            )
        if len(logprobs) != (0 if self.job.sampling.top_logprobs is None else len(token_ids)):
            raise ProtocolViolation(f"a delta has {len(logprobs)} logprobs for its tokens")
        log.token_ids.extend(token_ids)
        log.logprobs.extend(logprobs)
        self.num_tokens += len(token_ids)
        self._time(log, len(token_ids))
        self._wake_all()

    def finish(self, choice: int, finish: Finish) -> None:
        """One choice has ended."""
        if not 0 <= choice < len(self.choices) or self.choices[choice].finish is not None:
            raise ProtocolViolation(f"choice {choice} finished twice, or is none of this request")
        self.choices[choice].finish = finish
        self._wake_all()

    def fail(self, error: MeshError) -> None:
        """The job can't be finished; readers get the error after what is there."""
        self.error = error
        self._wake_all()

    def open_choices(self) -> list[int]:
        """Choices that have neither finished nor been dropped."""
        return [i for i, choice in enumerate(self.choices) if not choice.over]

    def was_dropped(self, choice: int) -> bool:
        """What its replica still sends of it means nothing."""
        return 0 <= choice < len(self.choices) and self.choices[choice].dropped

    def _time(self, log: ChoiceLog, num_new: int) -> None:
        now = self._clock()
        if log.last_token_at is not None:
            for _ in range(num_new):
                self._gaps.observe((now - log.last_token_at) / num_new)
        if log.first_token_at is None:
            log.first_token_at = now
        log.last_token_at = now

    def _wake_all(self) -> None:
        for reader in [r for r in self._readers if not r.on_growth()]:
            self.leave(reader)
