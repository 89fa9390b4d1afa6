"""The Python client of InferenceService: plain functions over one gRPC channel.

Raises the errors of `infermesh.errors`, as the gateway raised them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc

from infermesh.errors import from_rpc_error
from infermesh.v1 import inference_service_pb2 as pb
from infermesh.v1 import inference_service_pb2_grpc as pb_grpc
from infermesh.v1 import sampling_pb2

_SAMPLING = frozenset(sampling_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
_STOP = frozenset(sampling_pb2.StopConditions.DESCRIPTOR.fields_by_name)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One output token, natural log; `top` has the likeliest tokens, most likely first."""

    token_id: int
    token: bytes
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of one choice; the last delta of a choice has a finish reason."""

    text: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    # Of the tokens in `text`, where `top_logprobs` was asked for.
    logprobs: tuple[TokenLogprob, ...] = ()


class Client:
    """A gateway's models over gRPC.

    Args:
        address: the gateway's gRPC address, `host:port` or `unix:/path`.
        api_key: sent as bearer token.
        timeout_s: deadline of each call.
    """

    def __init__(
        self, address: str = "127.0.0.1:8002", api_key: str = "local", timeout_s: float = 600.0
    ) -> None:
        self._channel = grpc.insecure_channel(address)
        self._stub = pb_grpc.InferenceServiceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {api_key}"),)
        self._timeout_s = timeout_s
        self.usage: pb.Usage | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channel; streams still open are cancelled."""
        self._channel.close()

    def models(self) -> list[str]:
        """The ids of the models served now; those that generate come first."""
        return [model.id for model in self._list_models()]

    def chat(
        self,
        messages: str | Iterable[Mapping[str, str]],
        *,
        model: str | None = None,
        **options: Any,
    ) -> Iterator[Delta]:
        """Streams the answer to a question or a conversation.

        Args:
            messages: one user message, or mappings with `role` and `content`.
            model: absent: the gateway's first model.
            options: fields of SamplingParams, StopConditions and GenerationOptions, e.g.
                `temperature=0, max_tokens=50, stop_strings=["\\n"], n=2`.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        request = pb.ChatRequest(
            model=model or self._first_model(),
            messages=[pb.ChatMessage(**message) for message in messages],
            options=_options(options),
        )
        return self._stream(self._stub.Chat(request, **self._call()))

    def generate(
        self, prompt: str | Sequence[int], *, model: str | None = None, **options: Any
    ) -> Iterator[Delta]:
        """Streams the continuation of a text or of token ids; options as in `chat`."""
        request = pb.GenerateRequest(model=model or self._first_model(), options=_options(options))
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
        return self._stream(self._stub.Generate(request, **self._call()))

    def embed(
        self, texts: str | Sequence[str], *, model: str | None = None
    ) -> list[tuple[float, ...]]:
        """Unit vectors of texts, in their order; what they cost is in `usage`.

        Args:
            model: absent: the gateway's first embedding model.
        """
        request = pb.EmbedRequest(
            model=model or self._first_model(pb.MODEL_KIND_EMBED),
            texts=[texts] if isinstance(texts, str) else texts,
        )
        with _mesh_errors():
            answer: pb.EmbedResponse = self._stub.Embed(request, **self._call())
        self.usage = answer.usage
        return [tuple(one.values) for one in answer.embeddings]

    def count_tokens(self, text: str, *, model: str | None = None) -> int:
        """How many tokens a text is."""
        request = pb.CountTokensRequest(model=model or self._first_model(), text=text)
        with _mesh_errors():
            answer: pb.CountTokensResponse = self._stub.CountTokens(request, **self._call())
        return answer.num_tokens

    def _list_models(self) -> Sequence[pb.Model]:
        with _mesh_errors():
            answer: pb.ListModelsResponse = self._stub.ListModels(
                pb.ListModelsRequest(), **self._call()
            )
        return answer.models

    def _first_model(self, kind: "pb.ModelKind.ValueType" = pb.MODEL_KIND_GENERATE) -> str:
        return next((model.id for model in self._list_models() if model.kind == kind), "")

    def _call(self) -> dict[str, Any]:
        return {"metadata": self._metadata, "timeout": self._timeout_s}

    def _stream(self, call: Any) -> Iterator[Delta]:
        try:
            with _mesh_errors():
                for message in call:
                    if message.HasField("usage"):
                        self.usage = message.usage
                    for choice in message.choices:
                        yield _delta(choice)
        finally:
            call.cancel()


def _delta(choice: pb.ChoiceDelta) -> Delta:
    reason = None
    if choice.finish_reason:
        reason = _finish_reason(choice.finish_reason)
    logprobs = tuple(
        TokenLogprob(e.token_id, e.token, e.logprob, tuple(map(_top, e.top)))
        for e in choice.logprobs
    )
    return Delta(choice.text, choice.index, tuple(choice.token_ids), reason, logprobs)


def _finish_reason(reason: "sampling_pb2.FinishReason.ValueType") -> str:
    """`length` for FINISH_REASON_LENGTH; a newer gateway's reasons are `other`."""
    if reason not in sampling_pb2.FinishReason.values():
        return "other"
    return sampling_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()


def _top(entry: pb.TopLogprob) -> TokenLogprob:
    return TokenLogprob(entry.token_id, entry.token, entry.logprob)


def _options(options: Mapping[str, Any]) -> pb.GenerationOptions:
    sampling = {key: value for key, value in options.items() if key in _SAMPLING}
    stop = {key: value for key, value in options.items() if key in _STOP}
    rest = {k: v for k, v in options.items() if k not in _SAMPLING and k not in _STOP}
    return pb.GenerationOptions(
        sampling=sampling_pb2.SamplingParams(**sampling),
        stop=sampling_pb2.StopConditions(**stop),
        **rest,
    )


class _mesh_errors:  # noqa: N801  # reads as a statement: `with _mesh_errors():`
    """Raises a call's failure as the MeshError that caused it."""

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, grpc.RpcError):
            raise from_rpc_error(error) from None
