"""Reads one streamed chat answer over HTTP, as any OpenAI client would."""

import json
from collections.abc import Iterator, Sequence

import httpx

from infermesh.errors import Internal, MeshError, ReplicaUnavailable

Message = dict[str, str]
_TIMEOUT = httpx.Timeout(10.0, read=600.0)


def stream_chat(
    url: str, model: str, messages: Sequence[Message], api_key: str, **options: object
) -> Iterator[str]:
    """Pieces of the answer's text.

    Raises:
        MeshError: nothing answers at `url`, or the gateway refused; its sentence is the message.
    """
    body = {"model": model, "messages": list(messages), "stream": True, **options}
    headers = {"Authorization": f"Bearer {api_key}"}
    try:
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=_TIMEOUT
        ) as response:
            if response.status_code != 200:
                response.read()
                raise _refusal(response)
            yield from _pieces(response)
    except httpx.TransportError as error:
        raise _unreachable(url, error) from None


def _pieces(response: httpx.Response) -> Iterator[str]:
    for line in response.iter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line[len("data: ") :])
        if "error" in event:
            raise Internal(event["error"]["message"])
        for choice in event["choices"]:
            yield choice["delta"].get("content") or ""


def list_models(url: str, api_key: str) -> list[str]:
    """Ids of the models that the gateway serves now, and that generate."""
    try:
        response = httpx.get(
            f"{url}/v1/models", headers={"Authorization": f"Bearer {api_key}"}, timeout=_TIMEOUT
        )
    except httpx.TransportError as error:
        raise _unreachable(url, error) from None
    if response.status_code != 200:
        raise _refusal(response)
    listed = response.json()["data"]
    return [model["id"] for model in listed if model.get("kind") != "embed"]


def _refusal(response: httpx.Response) -> MeshError:
    try:
        return Internal(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return Internal(f"{response.url} answered with HTTP status {response.status_code}")


def _unreachable(url: str, error: httpx.TransportError) -> MeshError:
    if isinstance(error, httpx.ConnectError):
        return ReplicaUnavailable(f"nothing answers at {url}; `infermesh up` starts a mesh there")
    return ReplicaUnavailable(f"the connection to {url} broke ({type(error).__name__})")
