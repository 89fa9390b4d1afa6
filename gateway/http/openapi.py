"""The API's OpenAPI 3.1 description, from the same models that read the bodies."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gateway.http.call import IDEMPOTENCY_KEY, LAST_EVENT_ID
from gateway.http.chat_body import ChatBody
from gateway.http.completion_body import CompletionBody
from gateway.http.embeddings import EmbeddingsBody
from gateway.http.models import DetokenizeBody, TokenizeBody

_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_POSTS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("/v1/chat/completions", "Answer a conversation", ChatBody),
    ("/v1/completions", "Continue a prompt", CompletionBody),
    ("/v1/embeddings", "Embed texts", EmbeddingsBody),
    ("/tokenize", "Text or messages to token ids", TokenizeBody),
    ("/detokenize", "Token ids to text", DetokenizeBody),
)
_GETS = (
    ("/v1/models", "List the models served now"),
    ("/v1/models/{model}", "Describe a model"),
    ("/healthz", "The process is alive"),
    ("/readyz", "New requests are taken"),
)

_HEADERS: tuple[tuple[str, str], ...] = (
    (
        IDEMPOTENCY_KEY,
        "1 to 255 printable characters. The request goes on when its client is gone; whoever "
        "repeats it with the same key and body, at any gateway, has the whole answer from its "
        "first token on, while it runs and for `resume_grace_s` after. It is billed once. Another "
        "body: 409.",
    ),
    (
        LAST_EVENT_ID,
        "With an Idempotency-Key and `stream`: the `id` of the last event that was received. The "
        "stream goes on after it. Where nothing is kept any more: 404.",
    ),
)
_GENERATING = ("/v1/chat/completions", "/v1/completions")

# without a key
_OPEN = ("/healthz", "/readyz")


def openapi(version: str) -> dict[str, Any]:
    """The whole document."""
    _, schemas = models_json_schema(
        [(body, "validation") for _, _, body in _POSTS],
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, Any] = {path: {"post": _post(what, body)} for path, what, body in _POSTS}
    for path in _GENERATING:
        paths[path]["post"]["parameters"] = [_header(*one) for one in _HEADERS]
    paths |= {path: {"get": _get(path, what)} for path, what in _GETS}
    return {
        "openapi": "3.1.0",
        "info": {"title": "infermesh", "version": version},
        "paths": paths,
        "security": [{"apiKey": []}],
        "components": {
            "schemas": {**schemas["$defs"], "Error": _ERROR},
            "securitySchemes": {"apiKey": {"type": "http", "scheme": "bearer"}},
        },
    }


def _post(what: str, body: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    return {
        "summary": what,
        "requestBody": {"required": True, "content": content},
        "responses": _responses(),
    }


def _header(name: str, description: str) -> dict[str, Any]:
    schema = {"type": "string"}
    return {"name": name, "in": "header", "description": description, "schema": schema}


def _get(path: str, what: str) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": what, "responses": _responses()}
    if path in _OPEN:
        operation["security"] = []
    if "{model}" in path:
        parameter = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"] = [parameter]
    return operation


def _responses() -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "200": {"description": "done"},
        "4XX": {"description": "the request is at fault", "content": error},
        "5XX": {"description": "the mesh can't serve this now", "content": error},
    }
