"""`infermesh doctor`: one sentence about what limits the mesh now, and which setting would move it.

Reads the metrics of every process twice; what they say is `infermesh.diagnosis`'s.
"""

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import httpx
import typer

from infermesh.diagnosis import Process, Scrape, diagnose, parse
from infermesh.errors import InvalidRequest, ReplicaUnavailable
from infermesh.mesh.state import StateFolder

_READ_S = 5.0


def doctor(
    url: Annotated[
        list[str] | None,
        typer.Option(
            help="A process's metrics, http://host:port; repeatable. Default: this machine's mesh."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Between the two looks.", min=0.5)] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what limits the mesh now, and which setting would move it."""
    places = _given(url) if url else _of_this_machine()
    before = _look(places)
    if not before.processes:
        raise ReplicaUnavailable(f"nothing answers at {', '.join(places.values())}")
    time.sleep(seconds)
    finding = diagnose(before, _look(places))
    if as_json:
        facts = {"limit": finding.limit.value, "process": finding.process}
        typer.echo(json.dumps({**facts, "sentence": finding.sentence}))
    else:
        typer.echo(finding.sentence)


def _given(urls: list[str]) -> dict[str, str]:
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise InvalidRequest(f"--url is {url!r}; write it as http://host:port", param="url")
    return {url: url.rstrip("/").removesuffix("/metrics") for url in urls}


def _of_this_machine() -> dict[str, str]:
    meshes = StateFolder.of_user().running()
    if not meshes:
        raise ReplicaUnavailable("no mesh runs on this machine; give --url, or `infermesh up`")
    return places_of(meshes[-1])


def places_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """Where each process of a mesh has its metrics, from what `infermesh up` says of it."""
    own = {s["name"]: f"http://{s['metrics']}" for s in facts["services"] if s.get("metrics")}
    return {"gateway": facts["admin_url"], **own}


def _look(places: Mapping[str, str]) -> Scrape:
    with ThreadPoolExecutor(len(places)) as threads:
        answers = dict(zip(places, threads.map(_read, places.values()), strict=True))
    found = {name: process for name, process in answers.items() if process is not None}
    silent = tuple(sorted(name for name in answers if name not in found))
    return Scrape(time.monotonic(), found, silent)


def _read(url: str) -> Process | None:
    try:
        answer = httpx.get(f"{url}/metrics", timeout=_READ_S)
    except httpx.TransportError:
        return None
    return parse(answer.text) if answer.is_success else None
