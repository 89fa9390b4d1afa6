"""The admin port: metrics and debugging of this process. Keep it private."""

from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from gateway.cache.client import CacheClient
from gateway.fleet import Fleet
from gateway.http.cache_admin import cache_routes
from gateway.http.errors import on_defect, on_http_exception, on_mesh_error
from gateway.pipeline import Pipeline
from gateway.replica.client import ReplicaClient
from infermesh.errors import MeshError, NotFound
from infermesh.telemetry import metrics


def admin_app(pipeline: Pipeline, cache: CacheClient | None) -> Starlette:
    """The admin port's application."""

    async def request_by_id(request: Request) -> Response:
        request_id = request.path_params["request_id"]
        found = pipeline.records.find(request_id)
        if found is None:
            raise NotFound(f"no request {request_id} among the latest")
        return _json(found)

    async def replicas(request: Request) -> Response:
        del request
        return _json(_replicas(pipeline.fleet))

    return Starlette(
        routes=[
            Route("/metrics", _metrics),
            Route("/debug/requests/{request_id}", request_by_id),
            Route("/debug/replicas", replicas),
            Route("/healthz", _alive),
            *cache_routes(cache),
        ],
        exception_handlers={
            MeshError: on_mesh_error,
            HTTPException: on_http_exception,
            Exception: on_defect,
        },
    )


async def _metrics(request: Request) -> Response:
    del request
    body, content_type = metrics.exposition()
    return Response(body, headers={"content-type": content_type})


async def _alive(request: Request) -> Response:
    del request
    return PlainTextResponse("ok\n")


def _replicas(fleet: Fleet) -> list[dict[str, Any]]:
    return [_replica(client) for client in fleet.clients]


def _replica(client: ReplicaClient) -> dict[str, Any]:
    view = client.view
    error = view.error or client.error
    return {
        "replica_id": client.replica_id,
        "address": client.address,
        "state": view.state.value,
        "version": view.version,
        "routable": client.routable,
        "model": view.model_id,
        "model_fingerprint": view.fingerprint,
        "requests_running": view.load.num_requests_running,
        "requests_waiting": view.load.num_requests_waiting,
        "tokens_waiting": view.load.num_tokens_waiting,
        "kv_cache_usage_ratio": view.load.kv_cache_usage,
        "cached_blocks_known": len(client.prefixes),
        "inflight_here": client.num_inflight,
        "load_progress": view.load_progress,
        "load_stage": view.load_stage,
        "error": error.message if error else None,
    }


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
