"""Clients that lose their connection and come back by their Idempotency-Key, at any gateway."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from infermesh.v1 import inference_service_pb2, inference_service_pb2_grpc
from tests.e2e.cut_stream import PATH, TOKENS, Edge, Received, body, headers, stream, take, whole
from tests.e2e.mesh_process import Mesh, environment, run_infermesh, wait_until

STEP_S = 0.01
GRACE_S = 4.0


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """One slow replica with accounts; keys are remembered for a few seconds."""
    folder = tmp_path_factory.mktemp("mesh")
    profile = folder / "profile.json"
    nothing = ("per_prefill_token_us", "per_decode_row_us", "per_context_token_us")
    profile.write_text(json.dumps({"fixed_us": STEP_S * 1e6, **dict.fromkeys(nothing, 0)}))
    settings = {
        "shard.simulated_profile": profile,
        "gateway.resume_grace_s": GRACE_S,
        "scheduler.resume_grace_s": GRACE_S,
    }
    flags = [flag for name, value in settings.items() for flag in ("--set", f"{name}={value}")]
    with Mesh(folder, "--no-cache", "--engine", "simulated", *flags) as running:
        yield running


@pytest.fixture
def first(mesh: Mesh) -> Edge:
    """The mesh's own gateway."""
    facts = mesh.facts
    return Edge(facts["url"], mesh.service("gateway")["grpc_address"], facts["admin_url"])


@pytest.fixture
def second(mesh: Mesh, tmp_path: Path) -> Iterator[Edge]:
    """Another gateway in front of the same scheduler and auth service."""
    announced = tmp_path / "gateway.json"
    settings = {
        "gateway.http_address": "127.0.0.1:0",
        "gateway.admin_address": "127.0.0.1:0",
        "gateway.grpc_address": "127.0.0.1:0",
        "gateway.replicas": mesh.service("scheduler-0")["address"],
        "gateway.auth": mesh.service("auth")["address"],
        "gateway.usage_dir": str(tmp_path / "usage"),
        "gateway.resume_grace_s": GRACE_S,
        "telemetry.announce_file": str(announced),
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    log = tmp_path / "gateway.log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "gateway", *flags]
        process = subprocess.Popen(command, env=environment(tmp_path), stdout=out, stderr=out)
    try:
        wait_until(announced.exists, 60, "the second gateway starts")
        facts = json.loads(announced.read_text())
        http, admin = f"http://{facts['http_address']}", f"http://{facts['admin_address']}"
        edge = Edge(http, facts["grpc_address"], admin, process)
        wait_until(lambda: edge.metric("replica_ready") == 1, 30, "its session is open")
        yield edge
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)


@pytest.fixture
def tenant(mesh: Mesh, request: pytest.FixtureRequest) -> str:
    """A tenant of the test's own."""
    name: str = request.node.name.removeprefix("test_")[:40].replace("_", "-").rstrip("-")
    done = run_infermesh(mesh.tmp_path, "tenants", "create", name)
    assert done.returncode == 0, done.stderr
    return name


@pytest.fixture
def api_key(mesh: Mesh, tenant: str) -> str:
    return make_key(mesh, tenant)


def make_key(mesh: Mesh, tenant: str) -> str:
    done = run_infermesh(mesh.tmp_path, "keys", "create", "--tenant", tenant)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


_texts: dict[str, str] = {}


def undisturbed(edge: Edge, mesh: Mesh, **options: Any) -> str:
    """The text of the same call without a key, which nobody interrupts; asked for once."""
    call = body(mesh, **options)
    if repr(call) not in _texts:
        answer = whole(edge, call, dict(mesh.bearer)).json()
        _texts[repr(call)] = answer["choices"][0]["message"]["content"]
    return _texts[repr(call)]


def rows(mesh: Mesh, tenant: str) -> list[tuple[str, int, int]]:
    """The ledger's rows: status, prompt and completion tokens."""
    path = mesh.tmp_path / "state" / "infermesh" / "auth.sqlite3"
    query = "SELECT status, prompt_tokens, completion_tokens FROM usage WHERE tenant_id = ?"
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as ledger:
        return list(ledger.execute(query, (tenant,)))


def assert_billed_once(mesh: Mesh, tenant: str, got: Received, edges: list[Edge]) -> None:
    """One row of the whole answer, also after every gateway has sent what it had to send."""
    wait_until(lambda: bool(rows(mesh, tenant)), 30, "the usage row arrives")
    for edge in edges:
        wait_until(lambda edge=edge: edge.metric("detached_requests") == 0, 30)  # type: ignore[misc]
    # what a spool held before a marker has arrived when the marker has
    num_markers = len(rows(mesh, "local"))
    for edge in edges:
        assert whole(edge, body(mesh, max_tokens=1), dict(mesh.bearer)).status_code == 200
    wait_until(
        lambda: len(rows(mesh, "local")) >= num_markers + len(edges), 30, "the markers arrive"
    )
    assert got.usage is not None
    usage = got.usage["prompt_tokens"], got.usage["completion_tokens"]
    assert rows(mesh, tenant) == [("ok", *usage)]


def generated(mesh: Mesh) -> float:
    """Tokens that the scheduler has sampled."""
    return mesh.metric("scheduler-0", "generation_tokens_total")


def assert_nothing_left(mesh: Mesh) -> None:
    for name in ("num_blocks_used", "num_requests_running", "orphaned_requests"):
        wait_until(lambda name=name: mesh.metric("scheduler-0", name) == 0, 30, name)  # type: ignore[misc]


def test_client_comes_back_to_its_gateway_and_has_the_whole_answer(
    mesh: Mesh, first: Edge, tenant: str, api_key: str
) -> None:
    expected = undisturbed(first, mesh)
    before, joined = generated(mesh), first.metric("resumed_total", source="gateway")
    sent = headers(api_key, "same gateway")
    cut = stream(first, body(mesh), {**sent, "x-request-id": "the-first"}, chunks=8)
    assert expected.startswith(cut.text)
    assert 0 < len(cut.text) < len(expected)
    got = stream(first, body(mesh), sent)
    assert got.text == expected
    assert (got.finish_reason, got.done) == ("length", True)
    assert got.headers["infermesh-resumed"] == "true"
    assert got.headers["infermesh-original-request-id"] == "the-first"
    assert got.completion_id == cut.completion_id == "chatcmpl-the-first"
    assert first.metric("resumed_total", source="gateway") == joined + 1
    again = whole(first, body(mesh), sent)  # after the end, and not as a stream
    assert again.json()["choices"][0]["message"]["content"] == expected
    assert generated(mesh) - before == TOKENS
    assert_billed_once(mesh, tenant, got, [first])
    assert_nothing_left(mesh)


def test_client_comes_back_to_another_gateway_when_its_own_was_killed(
    mesh: Mesh, first: Edge, second: Edge, tenant: str, api_key: str
) -> None:
    expected = undisturbed(first, mesh, logprobs=True, top_logprobs=2)
    before = generated(mesh)
    attached = mesh.metric("scheduler-0", "attaches_total")
    sent = headers(api_key, "killed gateway")
    call = body(mesh, logprobs=True, top_logprobs=2)
    cut = stream(second, call, sent, chunks=8)
    assert second.process is not None
    second.process.send_signal(signal.SIGKILL)
    second.process.wait()
    wait_until(lambda: mesh.metric("scheduler-0", "orphaned_requests") == 1, 10)
    got = stream(first, call, sent)
    assert got.text == expected
    assert expected.startswith(cut.text)
    assert got.headers["infermesh-resumed"] == "true"
    assert got.headers["infermesh-original-request-id"] == cut.headers["x-request-id"]
    assert generated(mesh) - before == TOKENS
    assert mesh.metric("scheduler-0", "attaches_total") > attached
    assert mesh.metric("scheduler-0", "attaches_total", outcome="orphaned") >= 1
    assert_billed_once(mesh, tenant, got, [first])
    assert_nothing_left(mesh)


def test_client_takes_its_stream_to_another_gateway_while_its_own_lives(
    mesh: Mesh, first: Edge, second: Edge, tenant: str, api_key: str
) -> None:
    expected = undisturbed(first, mesh)
    before = generated(mesh)
    sent = headers(api_key, "both live")
    stream(second, body(mesh), sent, chunks=8)
    got = stream(first, body(mesh), sent)
    assert got.text == expected
    # and back, when all of it has ended
    back = stream(second, body(mesh), sent)
    assert back.text == expected
    assert generated(mesh) - before == TOKENS
    assert_billed_once(mesh, tenant, got, [first, second])
    assert_nothing_left(mesh)


def test_reader_left_behind_is_told_that_its_stream_was_taken_over(
    mesh: Mesh, first: Edge, second: Edge, tenant: str, api_key: str
) -> None:
    sent = headers(api_key, "taken")
    asked = {**body(mesh), "stream": True}
    left = Received()
    with (
        httpx.Client(timeout=30) as client,
        client.stream("POST", second.url + PATH, json=asked, headers=sent) as response,
    ):
        lines = response.iter_lines()
        take(left, next(lines))
        got = stream(first, body(mesh), sent)
        for line in lines:
            take(left, line)
    assert [error["code"] for error in left.errors] == ["cancelled"]
    assert "taken over" in left.errors[0]["message"]
    assert (got.finish_reason, got.errors) == ("length", [])
    assert_billed_once(mesh, tenant, got, [first, second])


def test_draining_gateway_leaves_the_request_to_another(
    mesh: Mesh, first: Edge, second: Edge, tenant: str, api_key: str
) -> None:
    expected = undisturbed(first, mesh, max_tokens=300)
    before = generated(mesh)
    sent, call = headers(api_key, "drained"), body(mesh, max_tokens=300)
    stream(second, call, sent, chunks=5)
    assert second.process is not None
    second.process.terminate()
    assert second.process.wait(30) == 0
    assert generated(mesh) - before < 300, "the drain waited for a client that had gone"
    got = stream(first, call, sent)
    assert got.text == expected
    assert generated(mesh) - before == 300
    assert_billed_once(mesh, tenant, got, [first])


def test_client_resumes_from_what_it_has(
    mesh: Mesh, first: Edge, second: Edge, api_key: str
) -> None:
    expected = undisturbed(first, mesh)
    sent = headers(api_key, "index")
    text, last_id, edges = "", "", [first, first, second]
    for chunks, edge in zip((5, 7, None), edges, strict=True):
        more = {"last-event-id": last_id} if last_id else {}
        got = stream(edge, body(mesh), {**sent, **more}, chunks)
        text, last_id = text + got.text, got.last_id
    assert text == expected
    assert last_id == str(TOKENS + 1)
    ended = stream(second, body(mesh), {**sent, "last-event-id": last_id})
    assert (ended.text, ended.finish_reason, ended.done) == ("", "length", True)
    unknown = {**headers(api_key, "nothing is kept"), "last-event-id": "3"}
    refused = whole(first, {**body(mesh), "stream": True}, unknown)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "not_found")


def test_key_belongs_to_one_body_and_one_tenant(
    mesh: Mesh, first: Edge, second: Edge, api_key: str, tenant: str
) -> None:
    sent = headers(api_key, "conflict")
    cut = stream(first, body(mesh), sent, chunks=3)
    for edge in (first, second):
        refused = whole(edge, body(mesh, max_tokens=TOKENS - 1), sent)
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "idempotency_conflict"
    other_tenant = f"{tenant[:30]}-2"
    assert run_infermesh(mesh.tmp_path, "tenants", "create", other_tenant).returncode == 0
    other = headers(make_key(mesh, other_tenant), "conflict")
    own = stream(first, body(mesh, seed=12), other)
    assert "infermesh-resumed" not in own.headers
    assert not own.text.startswith(cut.text)
    assert own.text == undisturbed(first, mesh, seed=12)
    assert stream(first, body(mesh), sent).text == undisturbed(first, mesh)


def test_request_is_cancelled_and_computed_anew_after_the_grace(
    mesh: Mesh, first: Edge, tenant: str, api_key: str
) -> None:
    sent, call = headers(api_key, "late"), body(mesh, max_tokens=800)
    before = generated(mesh)
    stream(first, call, sent, chunks=5)
    wait_until(lambda: first.metric("detached_requests") == 1, 10, "its client is missed")
    assert mesh.metric("scheduler-0", "num_blocks_used") > 0
    wait_until(lambda: first.metric("detached_requests") == 0, 30, "the grace is over")
    assert_nothing_left(mesh)
    assert generated(mesh) - before < 800
    before = generated(mesh)
    call = body(mesh, max_tokens=20)  # the key is free again: another body is no conflict
    got = stream(first, call, sent)
    assert "infermesh-resumed" not in got.headers
    assert generated(mesh) - before == 20
    wait_until(lambda: len(rows(mesh, tenant)) == 2, 30, "both computations are billed")
    assert sorted(row[0] for row in rows(mesh, tenant)) == ["cancelled", "ok"]


def test_orphan_is_cancelled_after_the_grace_when_its_gateway_never_returns(
    mesh: Mesh, second: Edge, api_key: str
) -> None:
    sent, call = headers(api_key, "orphan"), body(mesh, max_tokens=800)
    stream(second, call, sent, chunks=3)
    assert second.process is not None
    second.process.send_signal(signal.SIGKILL)
    second.process.wait()
    wait_until(lambda: mesh.metric("scheduler-0", "orphaned_requests") == 1, 10)
    before = generated(mesh)
    wait_until(lambda: generated(mesh) > before, 10, "it runs on")
    assert_nothing_left(mesh)
    assert generated(mesh) - before < 800


def test_grpc_client_comes_back_for_what_an_http_client_began(
    mesh: Mesh, first: Edge, api_key: str
) -> None:
    call = body(mesh, temperature=0.7)
    cut = stream(first, call, headers(api_key, "two ways"), chunks=4)
    pb = inference_service_pb2
    request = pb.ChatRequest(
        model=mesh.model, messages=[pb.ChatMessage(role="user", content="Tell me anything")]
    )
    options = request.options
    options.sampling.temperature, options.sampling.seed = 0.7, 11
    options.stop.max_tokens, options.stop.ignore_eos = TOKENS, True
    metadata = (
        ("authorization", f"Bearer {api_key}"),
        ("idempotency-key", "two ways"),
    )
    with grpc.insecure_channel(first.grpc_address) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        left = stub.Chat(request, metadata=metadata)
        next(left)
        left.cancel()
        answer = stub.Chat(request, metadata=metadata)
        told = dict(answer.initial_metadata())
        text = "".join(choice.text for message in answer for choice in message.choices)
    assert told["infermesh-resumed"] == "true"
    assert told["infermesh-original-request-id"] == cut.headers["x-request-id"]
    assert text == undisturbed(first, mesh, temperature=0.7)
