"""One choice's tokens become its text: detokenised, cut at stop strings, with its logprobs.

Each reader of a shared generation has its own.
"""

from collections import deque
from collections.abc import Sequence

from gateway.text.detokenizer import DecoderFamily
from gateway.text.stop_strings import StopMatcher
from gateway.tokens import ChoiceDelta, Finish, FinishReason, LogprobEntry, TokenLogprobs, TopEntry


class ChoiceText:
    """Feed it tokens, take deltas.

    Args:
        min_tokens: stop strings are not looked for in the text of this many first tokens.
        num_had: what is shown of this many first tokens was shown before, and is left out; the end
            counts as one more.
    """

    def __init__(
        self,
        index: int,
        family: DecoderFamily,
        stops: Sequence[str],
        min_tokens: int = 0,
        num_had: int = 0,
    ) -> None:
        self._index = index
        self._family = family
        self._detokenizer = family.start()
        self._matcher = StopMatcher(stops)
        self._min_tokens = min_tokens
        self._num_had = num_had
        self._decoded_len = 0  # characters that left the detokenizer
        self._shown_len = 0  # of these, characters that left the matcher
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._entries: deque[LogprobEntry] = deque()  # of tokens whose text is not shown yet
        self._finish_reason: FinishReason | None = None
        self.num_tokens = 0

    @property
    def done(self) -> bool:
        """The choice has ended, by a stop string or by the scheduler."""
        return self._finish_reason is not None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it has ended."""
        return self._finish_reason

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """Takes new tokens; those after a stop string are ignored and not counted."""
        for position, token_id in enumerate(token_ids):
            if self.done:
                return
            self.num_tokens += 1
            self._token_ids.append(token_id)
            if logprobs:
                self._entries.append(self._entry(token_id, logprobs[position]))
            self._show(self._detokenizer.push(token_id))
            if self.num_tokens == self._num_had or (self.done and self._num_had > self.num_tokens):
                self._leave_out()

    def finish(self, finish: Finish) -> None:
        """The scheduler ended the choice; a stop string found before wins."""
        if self.done:
            return
        if self._entries and self._entries[-1].token_id == finish.stop_token_id:
            tail = self._entries[-1]
            if tail.text_offset == self._decoded_len:  # EOS: ends the text, is no part of it
                self._entries.pop()
        self._show(self._detokenizer.finish())
        if not self.done:
            self._shown(self._matcher.finish())
            self._finish_reason = finish.reason
        if self.num_tokens < self._num_had:
            self._leave_out()

    def take(self) -> ChoiceDelta | None:
        """What is new since the last call; None where nothing can be shown."""
        if not self._text and not self.done:
            return None
        if self.num_tokens < self._num_had and not self.done:
            return None
        entries = tuple(self._take_entries())
        token_ids = tuple(self._token_ids)
        text = "".join(self._text)
        self._text.clear()
        self._token_ids.clear()
        return ChoiceDelta(self._index, text, token_ids, entries, self._finish_reason)

    def _leave_out(self) -> None:
        self._take_entries()
        self._token_ids.clear()
        self._text.clear()

    def _show(self, text: str) -> None:
        if not text:
            return
        self._decoded_len += len(text)
        if self.num_tokens <= self._min_tokens:
            self._shown(text)
            return
        self._shown(self._matcher.push(text))
        if self._matcher.matched:
            self._finish_reason = FinishReason.STOP

    def _shown(self, text: str) -> None:
        if text:
            self._shown_len += len(text)
            self._text.append(text)

    def _take_entries(self) -> list[LogprobEntry]:
        stopped = self._matcher.matched
        taken = []
        while self._entries and (
            self._entries[0].text_offset < self._shown_len or (self.done and not stopped)
        ):
            taken.append(self._entries.popleft())
        return taken

    def _entry(self, token_id: int, logprobs: TokenLogprobs) -> LogprobEntry:
        token_bytes = self._family.token_bytes
        top = tuple(TopEntry(i, token_bytes(i), p) for i, p in logprobs.top)
        return LogprobEntry(
            token_id, token_bytes(token_id), self._decoded_len, logprobs.logprob, top
        )
