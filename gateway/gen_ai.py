"""A request's trace span in the words of OpenTelemetry's semantic conventions for generative AI.

Source: opentelemetry.io/docs/specs/semconv/gen-ai, without the conventions' optional contents: no
prompt and no output.
"""

from typing import TYPE_CHECKING

from infermesh.telemetry import tracing

if TYPE_CHECKING:
    from gateway.records import RequestRecord

PROVIDER = "infermesh"
_OPERATIONS = {
    "chat": "chat",
    "grpc_chat": "chat",
    "completions": "text_completion",
    "grpc_generate": "text_completion",
    "embeddings": "embeddings",
    "grpc_embed": "embeddings",
}


def describe(record: "RequestRecord") -> None:
    """Names the current span, and says of it what is known when its request has ended."""
    operation = _OPERATIONS.get(record.endpoint, record.endpoint)
    attributes: dict[str, tracing.Value] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": record.model,
        "gen_ai.request.stream": record.stream,
        "gen_ai.request.choice.count": record.num_choices,
        "gen_ai.response.id": record.request_id,
        "gen_ai.response.model": record.model,
        "gen_ai.usage.input_tokens": record.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": record.usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.usage.cached_prompt_tokens,
        "infermesh.status": record.status,
        "infermesh.replicas": tuple(record.attempts),
    }
    if record.error is not None:
        attributes["error.type"] = record.error
    if record.cache is not None:
        attributes["infermesh.cache"] = record.cache.outcome.value
    tracing.describe(f"{operation} {record.model}".strip(), attributes)
