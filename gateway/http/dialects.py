"""The two bodies that generate, each with the shape of its answer."""

from dataclasses import dataclass

from gateway.http.chat_body import ChatBody
from gateway.http.chat_shape import ChatShape
from gateway.http.completion_body import CompletionBody
from gateway.http.completion_shape import CompletionShape
from gateway.http.parsing import parse_body
from gateway.http.shape import Head, Shape
from gateway.reply import Reply
from gateway.request import Conversation, GenerationRequest
from infermesh.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A chat body that was understood."""

    request: GenerationRequest
    stream: bool
    ignored: str
    with_logprobs: bool
    with_usage: bool
    id_prefix: str = "chatcmpl-"

    def shape(self, head: Head, reply: Reply) -> Shape:
        del reply
        return ChatShape(head, self.with_logprobs, self.with_usage)


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """A completion body that was understood."""

    request: GenerationRequest
    stream: bool
    ignored: str
    with_logprobs: bool
    with_usage: bool
    echo: bool
    id_prefix: str = "cmpl-"

    def shape(self, head: Head, reply: Reply) -> Shape:
        return CompletionShape(head, self.with_logprobs, self.with_usage, self._echo(reply))

    def _echo(self, reply: Reply) -> list[str]:
        if not self.echo:
            return []
        texts = []
        for prompt in self.request.prompts:
            assert not isinstance(prompt, Conversation)
            text = prompt if isinstance(prompt, str) else reply.model.text.decode(prompt)
            texts += [text] * self.request.options.n
        return texts


def parse_chat(raw: bytes, fallback_max_tokens: int | None) -> ChatCall:
    """POST /v1/chat/completions."""
    body = parse_body(ChatBody, raw)
    return ChatCall(
        request=body.request(fallback_max_tokens),
        stream=bool(body.stream),
        ignored=body.ignored(),
        with_logprobs=bool(body.logprobs),
        with_usage=_with_usage(body),
    )


def parse_completion(raw: bytes) -> CompletionCall:
    """POST /v1/completions."""
    body = parse_body(CompletionBody, raw)
    return CompletionCall(
        request=body.request(),
        stream=bool(body.stream),
        ignored=body.ignored(),
        with_logprobs=body.logprobs is not None,
        with_usage=_with_usage(body),
        echo=bool(body.echo),
    )


def _with_usage(body: ChatBody | CompletionBody) -> bool:
    if body.stream_options is None:
        return False
    if not body.stream:
        raise InvalidRequest(
            "stream_options is given; it is allowed only where stream is true",
            param="stream_options",
        )
    return bool(body.stream_options.include_usage)
