"""POST /v1/embeddings, as OpenAI writes it."""

import asyncio
import base64
import sys
from array import array
from contextlib import suppress
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from gateway import metrics
from gateway.cache.client import Vector
from gateway.embeddings import Embedded, EmbeddingRequest, Embeddings
from gateway.http.answer import IGNORED_FIELDS, Answer, as_error, unless_gone
from gateway.http.call import call_of, read_body
from gateway.http.parsing import ignored_fields, parse_body
from gateway.request import Call
from infermesh.config import GatewayConfig
from infermesh.errors import InvalidRequest, MeshError, SlowConsumer, UnsupportedParameter
from infermesh.telemetry import tracing

NAME = "embeddings"


class EmbeddingsBody(BaseModel):
    """The body of an embeddings call."""

    model_config = ConfigDict(strict=True, extra="allow")

    input: str | list[str] | list[int] | list[list[int]]
    model: str
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None

    def request(self) -> EmbeddingRequest:
        """The call in the gateway's own terms.

        Raises:
            InvalidRequest: an empty list.
            UnsupportedParameter: token ids, which mean nothing without OpenAI's tokenizer.
        """
        if isinstance(self.input, str):
            return EmbeddingRequest(self.model, (self.input,), False, self.dimensions)
        if not self.input:
            raise InvalidRequest("input is empty; it must have at least one text", param="input")
        texts = tuple(text for text in self.input if isinstance(text, str))
        if len(texts) < len(self.input):
            raise UnsupportedParameter(
                "input has token ids; only text is supported: a string or a list of strings",
                param="input",
            )
        return EmbeddingRequest(self.model, texts, True, self.dimensions)


# More vectors than this take milliseconds to render: not on the event loop.
_MOST_INLINE = 64


class EmbeddingsEndpoint:
    """POST one body, get its vectors."""

    def __init__(self, embeddings: Embeddings, config: GatewayConfig) -> None:
        self._embeddings = embeddings
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        answer = Answer(send, self._config.write_timeout_s)
        facts = {"infermesh.request_id": request.state.request_id}
        traceparent = request.headers.get("traceparent")
        try:
            with tracing.span(
                f"gateway.{NAME}", traceparent=traceparent, attributes=facts, serves=True
            ):
                await self._answer(request, answer)
        finally:
            answer.close()
            model = metrics.model_label(answer.model)
            metrics.REQUESTS.labels(NAME, str(answer.status), model).inc()

    async def _answer(self, request: Request, answer: Answer) -> None:
        try:
            raw = await read_body(request, self._config.max_request_bytes)
            body = parse_body(EmbeddingsBody, raw)
            wanted, call = body.request(), call_of(request, NAME, whole=True)
        except MeshError as error:
            await answer.refuse(error)
            return
        await unless_gone(request, self._serve(wanted, body, call, answer))

    async def _serve(
        self, wanted: EmbeddingRequest, body: EmbeddingsBody, call: Call, answer: Answer
    ) -> None:
        try:
            found = await self._embeddings.embed(wanted, call)
        except Exception as exc:
            await answer.refuse(as_error(exc))
            return
        finally:
            answer.model = self._embeddings.model_of(call.request_id)
        as_base64 = body.encoding_format == "base64"
        if len(found.vectors) > _MOST_INLINE:
            rendered = await asyncio.to_thread(_render, found, as_base64)
        else:
            rendered = _render(found, as_base64)
        ignored = ignored_fields(body.model_extra or {}, {})
        headers = {"content-type": "application/json", **found.headers}
        headers |= {IGNORED_FIELDS: ignored} if ignored else {}
        with suppress(SlowConsumer):  # there is nobody to tell
            await answer.begin(200, headers)
            await answer.write(rendered, more=False)


def _render(found: Embedded, as_base64: bool) -> bytes:
    return orjson.dumps(_json(found, as_base64))


def _json(found: Embedded, as_base64: bool) -> dict[str, Any]:
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": _base64(vector) if as_base64 else list(vector.values),
        }
        for index, vector in enumerate(found.vectors)
    ]
    count = found.usage.prompt_tokens
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": data, "model": found.model_id, "usage": usage}


def _base64(vector: Vector) -> str:
    """32-bit floats, little-endian, as OpenAI's clients read them."""
    values = array("f", vector.values)
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode("ascii")
