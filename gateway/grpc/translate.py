"""InferenceService messages to the gateway's own values and back. Decides nothing."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from gateway.cache.client import Embedder
from gateway.embeddings import Embedded
from gateway.request import (
    Attribution,
    Conversation,
    GenerationRequest,
    Options,
    Priority,
    Prompt,
    Sampling,
    StopRules,
)
from gateway.served_model import ServedModel
from gateway.tokens import ChoiceDelta, FinishReason, LogprobEntry, Usage
from infermesh.errors import InvalidRequest
from infermesh.v1 import inference_service_pb2 as pb
from infermesh.v1 import sampling_pb2

_FINISH = {
    FinishReason.STOP: sampling_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: sampling_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: sampling_pb2.FINISH_REASON_CANCELLED,
}


def generate_from_pb(request: pb.GenerateRequest) -> GenerationRequest:
    """A Generate call.

    Raises:
        InvalidRequest: it has no prompt.
    """
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("prompt is required: text or token_ids", param="prompt")
    prompt: Prompt = request.text if kind == "text" else tuple(request.token_ids.ids)
    return GenerationRequest(request.model, (prompt,), options_from_pb(request.options))


def chat_from_pb(request: pb.ChatRequest, fallback_max_tokens: int | None) -> GenerationRequest:
    """A Chat call; `fallback_max_tokens` as in Options."""
    prompt = conversation_from_pb(request.messages)
    options = options_from_pb(request.options)
    options = dataclasses.replace(options, fallback_max_tokens=fallback_max_tokens)
    return GenerationRequest(request.model, (prompt,), options)


def conversation_from_pb(messages: Sequence[pb.ChatMessage]) -> Conversation:
    """Messages as the chat template takes them.

    Raises:
        InvalidRequest: there are none, or one has no role.
    """
    if not messages:
        raise InvalidRequest("messages is empty; it must have at least one", param="messages")
    found: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        if not message.role:
            where = f"messages[{index}].role"
            raise InvalidRequest(f"{where} is required", param=where)
        entry = {"role": message.role, "content": message.content}
        found.append({**entry, "name": message.name} if message.name else entry)
    return Conversation(tuple(found))


def options_from_pb(options: pb.GenerationOptions) -> Options:
    """Options; absent fields stay open."""
    sampling, stop = options.sampling, options.stop
    return Options(
        sampling=Sampling(
            temperature=_given(sampling, "temperature"),
            top_p=_given(sampling, "top_p"),
            top_k=_given(sampling, "top_k"),
            min_p=_given(sampling, "min_p"),
            presence_penalty=_given(sampling, "presence_penalty"),
            frequency_penalty=_given(sampling, "frequency_penalty"),
            repetition_penalty=_given(sampling, "repetition_penalty"),
            logit_bias=dict(sampling.logit_bias),
            seed=_given(sampling, "seed"),
            top_logprobs=_given(sampling, "top_logprobs"),
        ),
        stop=StopRules(
            max_tokens=_given(stop, "max_tokens"),
            min_tokens=_given(stop, "min_tokens") or 0,
            stop_token_ids=tuple(stop.stop_token_ids),
            ignore_eos=stop.ignore_eos,
        ),
        stop_strings=tuple(options.stop_strings),
        n=options.n if options.HasField("n") else 1,
        priority=_priority(options.priority),
        user=options.user,
        attribution=Attribution(options.user, dict(options.labels)),
    )


def delta_to_pb(delta: ChoiceDelta, with_token_ids: bool) -> pb.ChoiceDelta:
    """New text of one choice."""
    reason = delta.finish_reason
    return pb.ChoiceDelta(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids if with_token_ids else (),
        logprobs=[_entry_to_pb(entry) for entry in delta.logprobs],
        finish_reason=_FINISH[reason] if reason else sampling_pb2.FINISH_REASON_UNSPECIFIED,
    )


def usage_to_pb(usage: Usage) -> pb.Usage:
    """What a request cost."""
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
    )


def models_to_pb(models: Iterable[tuple[str, ServedModel, int]]) -> list[pb.Model]:
    """Names, models and their ready replicas."""
    return [
        pb.Model(
            id=name,
            architecture=model.architecture,
            dtype=model.dtype,
            max_model_len=model.max_model_len,
            num_ready_replicas=num_ready,
            created_unix_s=model.created_unix_s,
            kind=pb.MODEL_KIND_GENERATE,
            quantization=model.quantization,
        )
        for name, model, num_ready in models
    ]


def embedders_to_pb(embedders: Iterable[Embedder]) -> list[pb.Model]:
    """Embedding models that can answer now."""
    return [
        pb.Model(
            id=embedder.model_id,
            max_model_len=embedder.max_tokens,
            num_ready_replicas=1,
            kind=pb.MODEL_KIND_EMBED,
            dimensions=embedder.dimensions,
        )
        for embedder in embedders
    ]


def embedded_to_pb(found: Embedded, request_id: str) -> pb.EmbedResponse:
    """Vectors and what they cost."""
    return pb.EmbedResponse(
        request_id=request_id,
        model=found.model_id,
        embeddings=[
            pb.TextEmbedding(values=vector.values, num_tokens=vector.num_tokens)
            for vector in found.vectors
        ],
        usage=usage_to_pb(found.usage),
    )


def _given(message: Any, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None


def _priority(priority: "sampling_pb2.Priority.ValueType") -> Priority:
    if priority == sampling_pb2.PRIORITY_UNSPECIFIED:
        return Priority.NORMAL
    try:
        return Priority(priority)
    except ValueError:
        raise InvalidRequest(
            f"priority is {priority}; it must be between 1 and 3", param="priority"
        ) from None


def _entry_to_pb(entry: LogprobEntry) -> pb.TokenLogprobEntry:
    return pb.TokenLogprobEntry(
        token_id=entry.token_id,
        token=entry.token,
        logprob=entry.logprob,
        top=[
            pb.TopLogprob(token_id=top.token_id, token=top.token, logprob=top.logprob)
            for top in entry.top
        ],
    )
