"""Questions to a gateway with a fake cache, and what its answers say of it."""

import json
from pathlib import Path
from typing import Any

import httpx

from tests.fake_cache import FakeCache
from tests.gateway_process import Edge, make_replicas, running_gateway

CHAT = "/v1/chat/completions"


def running(tmp_path: Path, **settings: Any) -> Any:
    cache = FakeCache(f"unix:{tmp_path}/cache.sock")
    # a machine that is busy must not turn a hit into a miss
    patient = {"cache_timeout_ms": 5e3, "cache_head_start_ms": 5e3, "cache_hold_ms": 5e3}
    return running_gateway(
        tmp_path, make_replicas(tmp_path), cache=cache, **{**patient, **settings}
    )


def ask(text: str = "Hello", **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}]
    return {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 60, **more}


async def post(edge: Edge, body: dict[str, Any], **headers: str) -> httpx.Response:
    path = CHAT if "messages" in body else "/v1/completions"
    response = await edge.http.post(path, json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response


async def stored(edge: Edge, body: dict[str, Any], **headers: str) -> httpx.Response:
    """A live answer, once the cache has it."""
    assert edge.cache is not None
    count = len(edge.cache.entries)
    response = await post(edge, body, **headers)
    await edge.cache.kept(count + 1)
    return response


def said(response: httpx.Response) -> tuple[str, str]:
    return response.headers["infermesh-cache"], response.headers["infermesh-cache-reason"]


def without_ids(text: str) -> list[dict[str, Any]]:
    """The events of a stream, text joined, without what differs between any two answers."""
    events = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
    return [normal(json.loads(event)) for event in events]


def normal(body: dict[str, Any]) -> dict[str, Any]:
    usage = dict(body.get("usage") or {})
    usage.pop("prompt_tokens_details", None)
    return {**body, "id": "", "created": 0, "usage": usage}


def merged(events: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream as one value: how it was cut into chunks is nobody's promise."""
    choices: dict[int, dict[str, Any]] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        one = choices.setdefault(
            choice["index"], {"text": "", "token_ids": [], "logprobs": [], "reason": None}
        )
        one["text"] += choice.get("text") or choice.get("delta", {}).get("content") or ""
        one["token_ids"] += choice.get("token_ids") or []
        one["logprobs"] += (choice.get("logprobs") or {}).get("content") or []
        one["reason"] = choice["finish_reason"] or one["reason"]
    return {"choices": choices, "first": events[0], "usage": events[-1]["usage"]}


def text_of(response: httpx.Response) -> str:
    text: str = merged(without_ids(response.text))["choices"][0]["text"]
    return text
