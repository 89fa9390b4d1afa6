"""Requests with an idempotency key: clients leave, come back, share, take them elsewhere."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.server import GatewayService
from infermesh.config import GatewayConfig
from infermesh.errors import QueueFull, ReplicaUnavailable
from infermesh.lifecycle import Lifecycle
from infermesh.v1 import scheduler_service_pb2 as pb
from tests.contract.gateway.test_failover import undisturbed
from tests.gateway_process import Edge, make_replicas, running_gateway

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {
    "model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 60,
}  # fmt: skip
KEY = {"idempotency-key": "one"}


async def leave_after(edge: Edge, tokens: int, **options: Any) -> None:
    """A streaming client that goes away in the middle."""
    body = {**ASK, **options, "stream": True}
    edge.replica.gated = True
    async with edge.http.stream("POST", CHAT, json=body, headers=KEY) as response:
        assert response.status_code == 200
        await edge.replica.step(tokens)
        async for line in response.aiter_lines():
            if line.startswith("id: "):
                break
    await until(lambda: bool(edge.service.pipeline._detached._tasks))


async def until(condition: Callable[[], bool]) -> None:
    """Polls what tells nobody that it has changed."""
    async with asyncio.timeout(10):
        for _ in iter(condition, True):
            await asyncio.sleep(0.005)  # a poll, see above


def text_of(response: httpx.Response) -> str:
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def flow(edge: Edge) -> None:
    for replica in edge.replicas:
        replica.gated = False
        replica._wake.set()


async def ask(edge: Edge, headers: dict[str, str] = KEY, **options: Any) -> httpx.Response:
    return await edge.http.post(CHAT, json={**ASK, **options}, headers=headers)


def content(response: httpx.Response, index: int = 0) -> str:
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][index]["message"]["content"]
    return text


@asynccontextmanager
async def second_gateway(edge: Edge, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Another gateway in front of the same replicas."""
    config = GatewayConfig(
        http_address="127.0.0.1:0",
        admin_address="127.0.0.1:0",
        grpc_address=f"unix:{tmp_path}/second.sock",
        replicas=tuple(replica.address for replica in edge.replicas),
    )
    service = GatewayService(config)
    lifecycle = Lifecycle(service, grace_s=5.0)
    running = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        life = tasks.create_task(lifecycle.run(running.set))
        await running.wait()
        async with asyncio.timeout(10):
            while not all(client.routable for client in service.fleet.clients):
                await service.fleet.changed(1.0)
        url = f"http://{service.announce()['http_address']}"
        async with httpx.AsyncClient(base_url=url, timeout=20, verify=False) as client:
            yield client
        lifecycle.request_stop()
        lifecycle.request_stop()
        await life


@pytest.fixture
async def other(edge: Edge, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with second_gateway(edge, tmp_path) as client:
        yield client


async def test_client_that_left_finds_its_answer_whole(edge: Edge) -> None:
    await leave_after(edge, 7)
    assert edge.replica.cancelled == []
    flow(edge)
    response = await ask(edge)
    assert content(response) == undisturbed()
    assert response.headers["infermesh-resumed"] == "true"
    assert len(edge.replica.submits) == 1
    record = response.headers["x-request-id"]
    found = (await edge.http.get(f"{edge.admin_url}/debug/requests/{record}")).json()
    assert found["resumed_from"] == edge.replica.submits[0].request_id


async def test_client_that_left_while_queued_finds_its_answer(edge: Edge) -> None:
    edge.replica.hold_accept = True
    asking = asyncio.create_task(ask(edge))
    await edge.replica.wait(lambda: len(edge.replica.submits) == 1)
    asking.cancel()
    again = asyncio.create_task(ask(edge))
    await until(lambda: edge.service.pipeline.admission.num_inflight == 2)
    edge.replica.accept_held()
    assert content(await again) == undisturbed()
    assert len(edge.replica.submits) == 1


async def test_clients_with_one_key_at_once_share_one_computation(edge: Edge) -> None:
    answers = await asyncio.gather(*(ask(edge) for _ in range(5)))
    assert {content(answer) for answer in answers} == {undisturbed()}
    assert len(edge.replica.submits) == 1
    assert sum("infermesh-resumed" in answer.headers for answer in answers) == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_finished_answer_is_read_again(edge: Edge, stream: bool) -> None:
    await ask(edge, n=2)
    again = await ask(edge, n=2, stream=stream)
    texts = [content(again, i) for i in range(2)] if not stream else [text_of(again)]
    assert texts[0] == undisturbed(0) if not stream else len(texts[0]) == 2 * len(undisturbed())
    assert len(edge.replica.submits) == 1


async def test_answer_that_a_stop_string_ended_is_kept_to_there(
    edge: Edge, other: httpx.AsyncClient
) -> None:
    first = await ask(edge, stop="word 3")
    again = await ask(edge, stop="word 3")
    elsewhere = await other.post(CHAT, json={**ASK, "stop": "word 3"}, headers=KEY)
    assert content(first) == content(again) == content(elsewhere)
    assert first.json()["usage"] == again.json()["usage"]
    ours, theirs = (one.json()["usage"]["completion_tokens"] for one in (first, elsewhere))
    assert ours == theirs
    assert len(edge.replica.submits) == 1
    assert elsewhere.json()["choices"][0]["finish_reason"] == "stop"


async def test_neighbour_with_a_stop_string_cuts_nothing_of_a_kept_answer(edge: Edge) -> None:
    await leave_after(edge, 3, temperature=0)
    neighbour = asyncio.create_task(ask(edge, {}, temperature=0, stop="word 1"))
    await edge.replica.wait(lambda: len(edge.replica.submits) == 2)
    flow(edge)
    assert content(await neighbour) == undisturbed()[: undisturbed().index("word 1")]
    assert content(await ask(edge, temperature=0)) == undisturbed()


async def test_failure_is_not_kept(edge: Edge) -> None:
    edge.replica.refusal = QueueFull("full")
    assert (await ask(edge)).status_code == 429
    edge.replica.refusal = None
    answer = await ask(edge)
    assert content(answer) == undisturbed()
    assert "infermesh-resumed" not in answer.headers


async def test_other_gateway_takes_the_stream_over(edge: Edge, other: httpx.AsyncClient) -> None:
    await leave_after(edge, 7, logprobs=False)
    asking = asyncio.create_task(other.post(CHAT, json=ASK, headers=KEY))
    await edge.replica.wait(lambda: len(edge.replica.attaches) == 2)
    flow(edge)
    response = await asking
    assert content(response) == undisturbed()
    assert response.headers["infermesh-original-request-id"] == edge.replica.submits[0].request_id
    await edge.service.pipeline.admission.idle()  # the first gateway has let go
    assert edge.replica.cancelled == []
    assert len(edge.replica.submits) == 1


async def test_taken_over_stream_goes_on_with_its_seed_when_its_replica_dies(
    edge: Edge, other: httpx.AsyncClient
) -> None:
    await leave_after(edge, 7)
    asking = asyncio.create_task(other.post(CHAT, json=ASK, headers=KEY))
    await edge.replica.wait(lambda: len(edge.replica.attaches) == 2)
    await until(lambda: any(session >= 0 for session, _ in edge.replica._streams))
    await edge.replica.step(5)
    first = edge.replica.submits[0]
    edge.replica._kept.clear()
    await edge.replica.break_sessions(ReplicaUnavailable("gone"))
    await edge.replica.wait(lambda: len(edge.replica.submits) == 2)
    flow(edge)
    assert content(await asking) == undisturbed()
    second = edge.replica.submits[1]
    assert second.sampling == first.sampling  # the seed was drawn
    assert second.prompt_token_ids == first.prompt_token_ids
    assert (second.idempotency_key, second.body_digest) == (
        first.idempotency_key,
        first.body_digest,
    )
    assert second.record_id == first.record_id
    assert len(second.choices[0].output_token_ids) >= 7


async def test_silent_replica_counts_as_not_having_it(edge: Edge) -> None:
    edge.replica.silent = True
    assert content(await ask(edge)) == undisturbed()
    assert len(edge.replica.attaches) == 1


async def test_every_replica_is_asked(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        edge = await stack.enter_async_context(
            running_gateway(tmp_path, make_replicas(tmp_path, 3))
        )
        other = await stack.enter_async_context(second_gateway(edge, tmp_path))
        assert content(await ask(edge)) == undisturbed()
        again = await other.post(CHAT, json=ASK, headers=KEY)
        assert content(again) == undisturbed()
        assert [len(replica.attaches) for replica in edge.replicas] == [2, 2, 2]
        assert sum(len(replica.submits) for replica in edge.replicas) == 1


async def test_another_body_is_a_conflict_here_and_elsewhere(
    edge: Edge, other: httpx.AsyncClient
) -> None:
    await ask(edge)
    for url in (edge.http, other):
        refused = await url.post(CHAT, json={**ASK, "max_tokens": 59}, headers=KEY)
        assert refused.status_code == 409
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("idempotency_conflict", "Idempotency-Key")
    same = await ask(edge, stream=True, stream_options={"include_usage": True}, priority="high")
    assert text_of(same) == undisturbed()


@pytest.mark.parametrize(
    ("headers", "options", "param"),
    [
        ({"idempotency-key": "k" * 256}, {}, "Idempotency-Key"),
        ({"idempotency-key": "a\tb"}, {}, "Idempotency-Key"),
        ({"idempotency-key": ""}, {}, "Idempotency-Key"),
        ({"last-event-id": "3"}, {"stream": True}, "Last-Event-ID"),
        ({**KEY, "last-event-id": "3"}, {}, "Last-Event-ID"),
        ({**KEY, "last-event-id": "3,4"}, {"stream": True}, "Last-Event-ID"),
        ({**KEY, "last-event-id": "three"}, {"stream": True}, "Last-Event-ID"),
        ({**KEY, "last-event-id": "3"}, {"stream": True, "n": 2}, "Last-Event-ID"),
    ],
)
async def test_what_can_not_be_resumed_is_refused_by_name(
    edge: Edge, headers: dict[str, str], options: dict[str, Any], param: str
) -> None:
    refused = await ask(edge, headers, **options)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


async def test_several_prompts_are_refused_by_name(edge: Edge) -> None:
    body = {"model": "tiny", "prompt": ["a", "b"]}
    refused = await edge.http.post("/v1/completions", json=body, headers=KEY)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")


async def test_resuming_from_an_index_needs_something_that_is_kept(edge: Edge) -> None:
    refused = await ask(edge, {**KEY, "last-event-id": "3"}, stream=True)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "not_found")
    assert edge.replica.submits == []


@pytest.mark.parametrize("n", [1, 2])
async def test_every_event_is_a_place_to_resume_from(edge: Edge, n: int) -> None:
    options = {"n": n, "stream": True, "return_token_ids": True, "max_tokens": 12}
    edge.replica.gated = True
    asking = asyncio.create_task(ask(edge, **options))
    await edge.replica.wait(lambda: len(edge.replica.submits) == 1)
    for _ in range(12):
        await edge.replica.step()
        await asyncio.sleep(0.002)  # so that tokens come in several events
    flow(edge)
    whole = (await asking).text
    events = [block for block in whole.split("\n\n") if "data: {" in block]
    ids = [block.split("\n")[0][4:] if block.startswith("id: ") else None for block in events]
    assert len(set(ids)) > 2
    for index, last_id in enumerate(ids):
        if last_id is None:
            continue
        rest = await ask(edge, {**KEY, "last-event-id": last_id}, **options)
        for choice in range(n):
            had = shown("\n\n".join(events[: index + 1]), choice)
            if index + 1 < len(events) and ids[index + 1] is None:
                had = shown("\n\n".join(events[: index + 2]), choice)  # of the same delta
            more, all_of_it = shown(rest.text, choice), shown(whole, choice)
            assert tuple(a + b for a, b in zip(had, more, strict=True)) == all_of_it
    assert len(edge.replica.submits) == 1


def shown(text: str, choice: int) -> tuple[str, list[int]]:
    """Text and token ids of a choice."""
    events = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
    found = [c for event in events for c in json.loads(event)["choices"] if c["index"] == choice]
    texts = "".join(one["delta"].get("content") or "" for one in found)
    return texts, [token for one in found for token in one.get("token_ids", [])]


async def test_answer_is_forgotten_after_the_grace(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, make_replicas(tmp_path), resume_grace_s=0.2) as edge:
        await leave_after(edge, 5)
        await edge.replica.wait(lambda: len(edge.replica.cancelled) == 1)
        assert edge.replica.num_streams == 0
        await edge.service.pipeline.admission.idle()
        assert len(edge.service.pipeline.resumption) == 0
        flow(edge)
        answer = await ask(edge)
        assert "infermesh-resumed" not in answer.headers
        assert len(edge.replica.submits) == 2


async def test_oldest_answers_go_when_too_many_are_kept(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, make_replicas(tmp_path), resume_max_requests=2) as edge:
        edge.replica._on_attach = lambda session, attach: refuse(edge, session, attach)  # type: ignore[method-assign]
        for key in "abc":
            await ask(edge, {"idempotency-key": key})
        again = [await ask(edge, {"idempotency-key": key}) for key in "cba"]
        assert ["infermesh-resumed" in one.headers for one in again] == [True, True, False]


def refuse(edge: Edge, session: int, attach: pb.Attach) -> None:
    edge.replica._send(session, refused=[pb.Refused(stream_id=attach.stream_id)])


async def test_drain_neither_waits_for_absent_clients_nor_cancels_their_requests(
    edge: Edge, other: httpx.AsyncClient
) -> None:
    await leave_after(edge, 7)
    async with asyncio.timeout(5):
        await edge.service.drain(60.0)
    assert edge.replica.cancelled == []
    assert edge.replica.num_streams == 1
    asking = asyncio.create_task(other.post(CHAT, json=ASK, headers=KEY))
    await edge.replica.wait(lambda: len(edge.replica.attaches) == 2)
    flow(edge)
    assert content(await asking) == undisturbed()


async def test_client_that_stays_is_told_and_comes_back_elsewhere_when_the_grace_ends(
    edge: Edge, other: httpx.AsyncClient
) -> None:
    edge.replica.gated = True
    body = {**ASK, "stream": True}
    async with edge.http.stream("POST", CHAT, json=body, headers=KEY) as response:
        await edge.replica.step(4)
        await edge.service.drain(0.01)
        text = (await response.aread()).decode()
    assert '"code":"draining"' in text
    assert edge.replica.cancelled == []
    asking = asyncio.create_task(other.post(CHAT, json=ASK, headers=KEY))
    await edge.replica.wait(lambda: len(edge.replica.attaches) == 2)
    flow(edge)
    assert content(await asking) == undisturbed()
    assert len(edge.replica.submits) == 1


async def test_headers_are_described_where_they_are_taken(edge: Edge) -> None:
    paths = (await edge.http.get("/openapi.json")).json()["paths"]
    for path in (CHAT, "/v1/completions"):
        names = [parameter["name"] for parameter in paths[path]["post"]["parameters"]]
        assert names == ["Idempotency-Key", "Last-Event-ID"]
    assert "parameters" not in paths["/v1/embeddings"]["post"]
