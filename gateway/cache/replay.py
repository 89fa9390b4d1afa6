"""A stored answer read like a live one: the same tokens, in pieces, through the same text path."""

import asyncio
from collections.abc import Callable

from gateway.cache.verdict import StoredAnswer
from gateway.generation import ChoiceNews, Generation
from gateway.request import Job
from gateway.tokens import Finish

# Tokens per piece of each choice: a long answer arrives in several chunks, as a live one does.
_PIECE_TOKENS = 16


class Replay:
    """A reader (as `generation.Reader`) of a generation that was filled from the cache."""

    def __init__(
        self, answer: StoredAnswer, job: Job, wake: asyncio.Event, clock: Callable[[], float]
    ) -> None:
        self._generation = filled(answer, job, clock)
        self._wake = wake
        self._positions = [0] * len(self._generation.choices)
        self._ended = [False] * len(self._generation.choices)
        wake.set()

    @property
    def generation(self) -> Generation:
        return self._generation

    @property
    def admitted(self) -> bool:
        return True

    @property
    def device_us(self) -> int:
        return 0

    def take(self) -> list[ChoiceNews]:
        """The next piece of every choice."""
        news = []
        for index, choice in enumerate(self._generation.choices):
            if self._ended[index]:
                continue
            start = self._positions[index]
            end = min(start + _PIECE_TOKENS, len(choice.token_ids))
            self._positions[index] = end
            self._ended[index] = end == len(choice.token_ids)
            finish = choice.finish if self._ended[index] else None
            pieces = choice.token_ids[start:end], choice.logprobs[start:end]
            news.append(ChoiceNews(index, *pieces, finish))
        if not all(self._ended):
            self._wake.set()  # nobody else will: all of it is there
        return news

    def decline(self, choice: int) -> None:
        """Gives no more of a choice, and tells nobody: all of it is there."""
        self._ended[choice] = True

    def close(self) -> None:
        """There is nobody to tell."""


def filled(answer: StoredAnswer, job: Job, clock: Callable[[], float]) -> Generation:
    """A generation that has ended with the stored tokens; none of its prompt was computed."""
    generation = Generation(job, clock)
    generation.accepted = True
    for index, choice in enumerate(answer.choices):
        generation.extend(index, 0, choice.token_ids, choice.logprobs)
        finish = Finish(
            choice.finish.reason,
            choice.finish.stop_token_id,
            cached_prompt_tokens=len(job.prompt_token_ids),
        )
        generation.finish(index, finish)
    return generation
