"""Chat answers as OpenAI writes them: chat.completion and chat.completion.chunk."""

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from gateway.http.shape import ChunkFrame, Head, WholeChoice, finite, usage_json
from gateway.text.vocabulary import display
from gateway.tokens import ChoiceDelta, LogprobEntry, TopEntry, Usage


class ChatShape:
    """Renders one chat answer."""

    def __init__(self, head: Head, with_logprobs: bool, with_usage: bool) -> None:
        self._head = head
        self._with_logprobs = with_logprobs
        self._frame = ChunkFrame(head, "chat.completion.chunk", with_usage)

    def opening(self, num_choices: int) -> bytes:
        delta = b'{"role":"assistant","content":"","refusal":null}'
        return b"".join(self._event(index, delta, (), None) for index in range(num_choices))

    def chunk(self, delta: ChoiceDelta) -> bytes:
        events = b""
        if delta.text or delta.logprobs:
            content = b'{"content":' + orjson.dumps(delta.text) + b"}"
            events = self._event(delta.index, content, delta.logprobs, None)
        if delta.finish_reason is not None:
            events += self._event(delta.index, b"{}", (), delta.finish_reason.value)
        return events

    def usage(self, usage: Usage) -> bytes:
        return self._frame.usage(usage)

    def whole(self, choices: Iterable[WholeChoice], usage: Usage) -> bytes:
        return orjson.dumps(
            {
                "id": self._head.response_id,
                "object": "chat.completion",
                "created": self._head.created,
                "model": self._head.model,
                "system_fingerprint": self._head.system_fingerprint,
                "choices": [self._choice(choice) for choice in choices],
                "usage": usage_json(usage),
            }
        )

    def _choice(self, choice: WholeChoice) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": logprobs_json(choice.logprobs) if self._with_logprobs else None,
            "finish_reason": choice.finish_reason.value if choice.finish_reason else None,
        }

    def _event(
        self, index: int, delta: bytes, entries: Sequence[LogprobEntry], finish: str | None
    ) -> bytes:
        logprobs = orjson.dumps(logprobs_json(entries)) if entries else b"null"
        reason = b"null" if finish is None else b'"%s"' % finish.encode()
        return self._frame.event(
            b'{"index":%d,"delta":%s,"logprobs":%s,"finish_reason":%s}'
            % (index, delta, logprobs, reason)
        )


def logprobs_json(entries: Iterable[LogprobEntry]) -> dict[str, Any]:
    """A choice's `logprobs`."""
    content = [
        {**_token(entry), "top_logprobs": [_token(top) for top in entry.top]} for entry in entries
    ]
    return {"content": content, "refusal": None}


def _token(entry: LogprobEntry | TopEntry) -> dict[str, Any]:
    return {
        "token": display(entry.token),
        "logprob": finite(entry.logprob),
        "bytes": list(entry.token),
    }
