"""A client that reads a stream as far as a test says, and what it has had of it then."""

from __future__ import annotations

import contextlib
import json
import subprocess
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.mesh_process import Mesh

TOKENS = 60
PATH = "/v1/chat/completions"


@dataclass
class Edge:
    """One gateway."""

    url: str
    grpc_address: str
    admin_url: str
    process: subprocess.Popen[bytes] | None = None

    def metric(self, name: str, **labels: str) -> float:
        with urllib.request.urlopen(f"{self.admin_url}/metrics", timeout=10) as response:
            families = text_string_to_metric_families(response.read().decode())
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == f"infermesh_{name}" and labels.items() <= sample.labels.items()
        )


@dataclass
class Received:
    """What a client has had of a stream."""

    text: str = ""
    last_id: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    completion_id: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False


def body(mesh: Mesh, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Tell me anything"}]
    call = {"model": mesh.model, "messages": messages, "max_tokens": TOKENS, "temperature": 1}
    return {**call, "ignore_eos": True, "seed": 11, **options}


def headers(api_key: str, key: str = "", **more: str) -> dict[str, str]:
    keyed = {"idempotency-key": key} if key else {}
    return {"authorization": f"Bearer {api_key}", **keyed, **more}


def stream(
    edge: Edge, call: dict[str, Any], sent: dict[str, str], chunks: int | None = None
) -> Received:
    """Reads a stream, to its end or until so many chunks with text have come; then the socket is
    closed.
    """
    got = Received()
    asked = {**call, "stream": True, "stream_options": {"include_usage": True}}
    num_texts = 0
    with (
        httpx.Client(timeout=30) as client,
        client.stream("POST", edge.url + PATH, json=asked, headers=sent) as response,
    ):
        assert response.status_code == 200, response.read()
        got.headers = dict(response.headers)
        with contextlib.suppress(httpx.RemoteProtocolError):  # the gateway was killed
            for line in response.iter_lines():
                take(got, line)
                num_texts += line.startswith("data: {") and '"content":"' in line
                if chunks is not None and num_texts > chunks:  # the first one opens the answer
                    break
    return got


def take(got: Received, line: str) -> None:
    if line.startswith("id: "):
        got.last_id = line[4:]
    if line == "data: [DONE]":
        got.done = True
    elif line.startswith("data: "):
        event = json.loads(line[6:])
        if "error" in event:
            got.errors.append(event["error"])
            return
        got.completion_id = event["id"]
        got.usage = event.get("usage") or got.usage
        for choice in event["choices"]:
            got.text += choice["delta"].get("content") or ""
            got.finish_reason = choice["finish_reason"] or got.finish_reason


def whole(edge: Edge, call: dict[str, Any], sent: dict[str, str]) -> httpx.Response:
    return httpx.post(edge.url + PATH, json=call, headers=sent, timeout=30)
