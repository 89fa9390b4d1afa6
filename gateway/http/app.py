"""The public HTTP application: routes, request ids, CORS, errors."""

from collections.abc import Callable

import orjson
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import infermesh
from gateway import metrics
from gateway.auth.headers import LIMIT_HEADERS
from gateway.cache.verdict import HEADERS as CACHE_HEADERS
from gateway.embeddings import Embeddings
from gateway.http.answer import IGNORED_FIELDS
from gateway.http.call import ORIGINAL_REQUEST_ID, RESUMED, draw_request_id
from gateway.http.dialects import ChatCall, parse_chat, parse_completion
from gateway.http.embeddings import EmbeddingsEndpoint
from gateway.http.errors import error_response, on_defect, on_http_exception, on_mesh_error
from gateway.http.generate import WATERFALL, GenerateEndpoint
from gateway.http.models import ModelEndpoints
from gateway.http.openapi import openapi
from gateway.pipeline import Pipeline
from infermesh.config import GatewayConfig
from infermesh.errors import Cancelled, Draining, MeshError
from infermesh.telemetry.metrics import OTHER

_REQUEST_ID = "x-request-id"
_METHODS = frozenset(("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"))


def public_app(pipeline: Pipeline, embeddings: Embeddings, config: GatewayConfig) -> Starlette:
    """OpenAI's API over one pipeline."""
    fallback = config.default_max_tokens or None

    def chat(raw: bytes) -> ChatCall:
        return parse_chat(raw, fallback)

    models = ModelEndpoints(pipeline.fleet, embeddings, pipeline.gate, config.max_request_bytes)
    post, get = ["POST"], ["GET"]
    routes = [
        Route(
            "/v1/chat/completions", GenerateEndpoint("chat", pipeline, config, chat), methods=post
        ),
        Route(
            "/v1/completions",
            GenerateEndpoint("completions", pipeline, config, parse_completion),
            methods=post,
        ),
        Route(
            "/v1/embeddings",
            EmbeddingsEndpoint(embeddings, config),
            methods=post,
        ),
        Route("/v1/models", models.list, methods=get),
        # names like ORG/NAME have a slash
        Route("/v1/models/{model:path}", models.get, methods=get),
        Route("/tokenize", models.tokenize, methods=post),
        Route("/detokenize", models.detokenize, methods=post),
        Route("/healthz", _alive, methods=get),
        Route("/readyz", _readiness(lambda: pipeline.admission.open), methods=get),
        Route("/openapi.json", _openapi, methods=get),
    ]
    middleware = [Middleware(RequestIdMiddleware)]
    if config.cors_allow_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[
                *(_REQUEST_ID, WATERFALL, IGNORED_FIELDS, "retry-after"),
                *(*LIMIT_HEADERS, *CACHE_HEADERS),
                *(RESUMED, ORIGINAL_REQUEST_ID),
            ],
        )
        middleware.insert(0, cors)
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            MeshError: on_mesh_error,
            HTTPException: on_http_exception,
            Exception: on_defect,
        },
    )


class RequestIdMiddleware:
    """Gives every request its id, the client's or a new one, says it in the response; counts it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = draw_request_id(Headers(scope=scope).get(_REQUEST_ID))
        scope.setdefault("state", {})["request_id"] = request_id
        status = Cancelled.http_status

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[_REQUEST_ID] = request_id
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            _count(scope, status)


def _count(scope: Scope, status: int) -> None:
    """Nothing that a client can make up becomes a label."""
    route = scope.get("route")
    path = route.path if isinstance(route, Route) else OTHER
    method = scope["method"] if scope["method"] in _METHODS else OTHER
    metrics.HTTP_REQUESTS.labels(path, method, str(status)).inc()


async def _alive(request: Request) -> Response:
    del request
    return PlainTextResponse("ok\n")


def _readiness(is_open: Callable[[], bool]) -> Callable[[Request], object]:
    """Ready while new requests are taken; replicas don't count, the gateway sheds for them."""

    async def ready(request: Request) -> Response:
        del request
        if is_open():
            return PlainTextResponse("ready\n")
        return error_response(Draining("the gateway is shutting down"))

    return ready


async def _openapi(request: Request) -> Response:
    del request
    return Response(orjson.dumps(openapi(infermesh.__version__)), media_type="application/json")
