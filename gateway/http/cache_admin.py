"""The operator's word to the cache, on the admin port: a bad hit, entries to remove."""

import orjson
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.cache.client import CacheClient
from gateway.http.call import read_body
from gateway.http.parsing import parse_body
from infermesh.errors import InvalidRequest, NotFound

_MAX_BODY_BYTES = 64 << 10
_SCOPES = ("entry_id", "tenant", "model_id", "sharing_domain", "all")


class BadHitBody(BaseModel):
    """An entry whose answer did not fit the question it was given for."""

    model_config = ConfigDict(strict=True, extra="forbid")

    entry_id: str
    request_id: str = ""


class InvalidateBody(BaseModel):
    """One scope, and whether to count only."""

    model_config = ConfigDict(strict=True, extra="forbid")

    entry_id: str | None = None
    tenant: str | None = None
    model_id: str | None = None
    sharing_domain: str | None = None
    all: bool | None = None
    dry_run: bool = False

    def scope(self) -> tuple[str, str | bool]:
        """The scope's name and value.

        Raises:
            InvalidRequest: there is none, or more than one.
        """
        given = {name: value for name in _SCOPES if (value := getattr(self, name))}
        if len(given) != 1:
            raise InvalidRequest(f"exactly one of {', '.join(_SCOPES)} must be given")
        return next(iter(given.items()))


def cache_routes(cache: CacheClient | None) -> list[Route]:
    """POST /cache/report-bad-hit and /cache/invalidate."""

    def client() -> CacheClient:
        if cache is None:
            raise NotFound("this gateway has no semantic cache: gateway.cache is empty")
        return cache

    async def report_bad_hit(request: Request) -> Response:
        body = parse_body(BadHitBody, await read_body(request, _MAX_BODY_BYTES))
        newly = await client().report_bad_hit(body.entry_id, body.request_id)
        return _json({"entry_id": body.entry_id, "newly_quarantined": newly})

    async def invalidate(request: Request) -> Response:
        body = parse_body(InvalidateBody, await read_body(request, _MAX_BODY_BYTES))
        count = await client().invalidate(*body.scope(), body.dry_run)
        return _json({"num_entries": count, "dry_run": body.dry_run})

    return [
        Route("/cache/report-bad-hit", report_bad_hit, methods=["POST"]),
        Route("/cache/invalidate", invalidate, methods=["POST"]),
    ]


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
