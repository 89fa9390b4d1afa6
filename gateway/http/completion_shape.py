"""Completion answers as OpenAI writes them: text_completion, streamed or whole."""

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from gateway.http.shape import ChunkFrame, Head, WholeChoice, finite, usage_json
from gateway.text.vocabulary import display
from gateway.tokens import ChoiceDelta, LogprobEntry, Usage


class CompletionShape:
    """Renders one completion answer.

    Args:
        echo: for each choice, the prompt's text that goes before it; empty: none.
    """

    def __init__(
        self, head: Head, with_logprobs: bool, with_usage: bool, echo: Sequence[str] = ()
    ) -> None:
        self._head = head
        self._with_logprobs = with_logprobs
        self._echo = echo
        self._frame = ChunkFrame(head, "text_completion", with_usage)

    def opening(self, num_choices: int) -> bytes:
        return b"".join(self._event(i, text, (), None) for i, text in enumerate(self._echo))

    def chunk(self, delta: ChoiceDelta) -> bytes:
        events = b""
        if delta.text or delta.logprobs:
            events = self._event(delta.index, delta.text, delta.logprobs, None)
        if delta.finish_reason is not None:
            events += self._event(delta.index, "", (), delta.finish_reason.value)
        return events

    def usage(self, usage: Usage) -> bytes:
        return self._frame.usage(usage)

    def whole(self, choices: Iterable[WholeChoice], usage: Usage) -> bytes:
        return orjson.dumps(
            {
                "id": self._head.response_id,
                "object": "text_completion",
                "created": self._head.created,
                "model": self._head.model,
                "system_fingerprint": self._head.system_fingerprint,
                "choices": [self._choice(choice) for choice in choices],
                "usage": usage_json(usage),
            }
        )

    def _choice(self, choice: WholeChoice) -> dict[str, Any]:
        echo = self._echo[choice.index] if self._echo else ""
        return {
            "index": choice.index,
            "text": echo + "".join(choice.text),
            "logprobs": logprobs_json(choice.logprobs) if self._with_logprobs else None,
            "finish_reason": choice.finish_reason.value if choice.finish_reason else None,
        }

    def _event(
        self, index: int, text: str, entries: Sequence[LogprobEntry], finish: str | None
    ) -> bytes:
        logprobs = orjson.dumps(logprobs_json(entries)) if entries else b"null"
        reason = b"null" if finish is None else b'"%s"' % finish.encode()
        return self._frame.event(
            b'{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s}'
            % (index, orjson.dumps(text), logprobs, reason)
        )


def logprobs_json(entries: Iterable[LogprobEntry]) -> dict[str, Any]:
    """A choice's `logprobs` in the older form."""
    listed = list(entries)
    return {
        "tokens": [display(entry.token) for entry in listed],
        "token_logprobs": [finite(entry.logprob) for entry in listed],
        "top_logprobs": [
            {display(top.token): finite(top.logprob) for top in entry.top} or None
            for entry in listed
        ],
        "text_offset": [entry.text_offset for entry in listed],
    }
