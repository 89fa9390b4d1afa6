"""GET /v1/models and /v1/models/{id}; POST /tokenize and /detokenize."""

from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response

from gateway.auth.gate import Gate
from gateway.cache.client import Embedder
from gateway.embeddings import Embeddings
from gateway.fleet import Fleet
from gateway.http.call import bearer, read_body
from gateway.http.chat_body import ChatMessage, conversation
from gateway.http.parsing import parse_body
from gateway.identity import INFERENCE, MODELS, Principal
from gateway.ranges import check_token_ids
from gateway.served_model import ServedModel
from infermesh.errors import InvalidRequest


class TokenizeBody(BaseModel):
    """Text as a completion's prompt, or messages as a chat's."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(BaseModel):
    """Token ids to turn into text."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    tokens: list[int]


class ModelEndpoints:
    """What can be asked of models without generating."""

    def __init__(
        self, fleet: Fleet, embeddings: Embeddings, gate: Gate, max_request_bytes: int
    ) -> None:
        self._fleet = fleet
        self._embeddings = embeddings
        self._gate = gate
        self._max_request_bytes = max_request_bytes

    async def list(self, request: Request) -> Response:
        """Every name that is served now."""
        principal = await self._identify(request, MODELS)
        # models that generate come first: clients take the first where none is named
        data = [
            _model_json(name, model)
            for name, model in self._fleet.names().items()
            if principal.sees(name, model.model_id)
        ]
        data += [
            _embedder_json(one) for one in self._embeddings.models() if principal.sees(one.model_id)
        ]
        return _json({"object": "list", "data": data})

    async def get(self, request: Request) -> Response:
        """One model."""
        principal = await self._identify(request, MODELS)
        name = request.path_params["model"]
        for embedder in self._embeddings.models():
            if embedder.model_id == name:
                principal.require_model(name)
                return _json(_embedder_json(embedder))
        return _json(_model_json(name, self._model(name, principal)))

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a prompt or a conversation, as a generation would see them."""
        principal = await self._identify(request, INFERENCE)
        raw = await read_body(request, self._max_request_bytes)
        body = parse_body(TokenizeBody, raw)
        model = self._model(body.model, principal)
        if body.messages is not None:
            chat = conversation(body.messages, body.chat_template_kwargs)
            tokens = await model.text.encode_chat(chat.messages, chat.template_kwargs)
        elif body.prompt is not None:
            tokens = await model.text.encode(
                body.prompt, add_special_tokens=body.add_special_tokens
            )
        else:
            raise InvalidRequest("prompt is required", param="prompt")
        return _json({"tokens": tokens, "count": len(tokens), "max_model_len": model.max_model_len})

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, special tokens included."""
        principal = await self._identify(request, INFERENCE)
        raw = await read_body(request, self._max_request_bytes)
        body = parse_body(DetokenizeBody, raw)
        model = self._model(body.model, principal)
        check_token_ids("tokens", body.tokens, model.vocab_size)
        return _json({"prompt": model.text.decode(body.tokens, skip_special_tokens=False)})

    async def _identify(self, request: Request, scope: str) -> Principal:
        credential = bearer(request.headers.get("authorization", ""))
        return await self._gate.identify(credential, scope)

    def _model(self, name: str | None, principal: Principal) -> ServedModel:
        model = self._fleet.default_model() if name is None else self._fleet.resolve(name)
        principal.require_model(name or model.model_id, model.model_id)
        return model


def _model_json(name: str, model: ServedModel) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created_unix_s,
        "owned_by": "infermesh",
        "root": model.model_id,
        "max_model_len": model.max_model_len,
        "dtype": model.dtype,
        "quantization": model.quantization or None,
        "kind": "generate",
    }


def _embedder_json(embedder: Embedder) -> dict[str, Any]:
    return {
        "id": embedder.model_id,
        "object": "model",
        "created": 0,
        "owned_by": "infermesh",
        "root": embedder.model_id,
        "max_model_len": embedder.max_tokens,
        "kind": "embed",
        "dimensions": embedder.dimensions,
    }


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
